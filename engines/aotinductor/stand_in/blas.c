// Matrix products of a GPU that is not there: each is one launch.
#include <cublasLt.h>
#include <cublas_v2.h>

#include "gpu.h"

#define OK CUBLAS_STATUS_SUCCESS
#define LAUNCHED { stand_in_launched(); return OK; }
typedef cublasHandle_t H;
typedef cublasOperation_t Op;
typedef cudaDataType Type;

EXPORT cublasStatus_t cublasCreate_v2(H *h) { *h = (H)64; return OK; }
EXPORT cublasStatus_t cublasDestroy_v2(H h) { return OK; }
EXPORT cublasStatus_t cublasSetStream_v2(H h, cudaStream_t s) { return OK; }
EXPORT cublasStatus_t cublasSetWorkspace_v2(H h, void *workspace, size_t size) { return OK; }
EXPORT cublasStatus_t cublasSetMathMode(H h, cublasMath_t mode) { return OK; }
EXPORT cublasStatus_t cublasGetMathMode(H h, cublasMath_t *mode) { *mode = CUBLAS_DEFAULT_MATH; return OK; }
EXPORT cublasStatus_t cublasSetPointerMode_v2(H h, cublasPointerMode_t mode) { return OK; }
EXPORT cublasStatus_t cublasGetPointerMode_v2(H h, cublasPointerMode_t *mode) {
    *mode = CUBLAS_POINTER_MODE_HOST;
    return OK;
}
EXPORT cublasStatus_t cublasSgemm_v2(H h, Op a, Op b, int m, int n, int k, const float *alpha, const float *A, int lda,
                                     const float *B, int ldb, const float *beta, float *C, int ldc) LAUNCHED
EXPORT cublasStatus_t cublasGemmEx(H h, Op a, Op b, int m, int n, int k, const void *alpha, const void *A, Type ta,
                                   int lda, const void *B, Type tb, int ldb, const void *beta, void *C, Type tc,
                                   int ldc, cublasComputeType_t compute, cublasGemmAlgo_t algorithm) LAUNCHED
EXPORT cublasStatus_t cublasSgemmStridedBatched(H h, Op a, Op b, int m, int n, int k, const float *alpha,
                                                const float *A, int lda, long long sa, const float *B, int ldb,
                                                long long sb, const float *beta, float *C, int ldc, long long sc,
                                                int count) LAUNCHED
EXPORT cublasStatus_t cublasGemmStridedBatchedEx(H h, Op a, Op b, int m, int n, int k, const void *alpha,
                                                 const void *A, Type ta, int lda, long long sa, const void *B, Type tb,
                                                 int ldb, long long sb, const void *beta, void *C, Type tc, int ldc,
                                                 long long sc, int count, cublasComputeType_t compute,
                                                 cublasGemmAlgo_t algorithm) LAUNCHED
EXPORT cublasStatus_t cublasLtMatmul(cublasLtHandle_t h, cublasLtMatmulDesc_t d, const void *alpha, const void *A,
                                     cublasLtMatrixLayout_t la, const void *B, cublasLtMatrixLayout_t lb,
                                     const void *beta, const void *C, cublasLtMatrixLayout_t lc, void *D,
                                     cublasLtMatrixLayout_t ld, const cublasLtMatmulAlgo_t *algorithm, void *workspace,
                                     size_t size, cudaStream_t s) LAUNCHED
EXPORT cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t h, cublasLtMatmulDesc_t d,
                                                     cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t e,
                                                     cublasLtMatmulPreference_t p, int wanted,
                                                     cublasLtMatmulHeuristicResult_t *results, int *found) {
    *found = 1;
    results->state = OK;
    results->workspaceSize = 0;
    return OK;
}
