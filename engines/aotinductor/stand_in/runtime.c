// The CUDA runtime of a GPU that is not there: its memory is the host's, kernels are counted and not run.
//
// Copies and fills are made at once, or, where they are captured, whenever their graph is launched. What CUDA refuses
// while a stream is captured is refused, and the capture is lost with it: asking or awaiting an event, awaiting a stream
// or the device, copying with a wait.
#include <cuda_runtime_api.h>
#include <stdint.h>

#include "gpu.h"

#define OK cudaSuccess
#define UNLESS_CAPTURING if (capturing == CAPTURING) return refused(cudaErrorStreamCaptureUnsupported)

struct work { void *target; const void *source; int value; size_t size; };  // a copy, or a fill where source is NULL
struct graph { long launches, count; struct work *works; };
struct event { int captured; };
static int capturing = NOT_CAPTURING;
static cudaStream_t captured_stream;
static int invalid;
static long launches;
static struct graph captured;
static long handles = 4096;

void stand_in_launched(void) { capturing ? captured.launches++ : launches++; }
long stand_in_launches(void) { return launches; }

static cudaError_t refused(cudaError_t error) { invalid = 1; return error; }
static void run(struct work w) {
    if (w.source) memmove(w.target, w.source, w.size);
    else memset(w.target, w.value, w.size);
}
// Does it, or keeps it for the launches of the graph that is being captured.
static cudaError_t submit(struct work w) {
    if (!capturing) { run(w); return OK; }
    captured.works = realloc(captured.works, (captured.count + 1) * sizeof w);
    captured.works[captured.count++] = w;
    return OK;
}
static struct graph copy_of(const struct graph *g) {
    struct graph made = *g;
    made.works = memcpy(malloc(g->count * sizeof *g->works + 1), g->works ? g->works : (void *)"", g->count * sizeof *g->works);
    return made;
}

// The device.
EXPORT cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return OK; }
EXPORT cudaError_t cudaGetDevice(int *device) { *device = 0; return OK; }
EXPORT cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : OK; }
EXPORT cudaError_t cudaGetLastError(void) { return OK; }
EXPORT cudaError_t cudaPeekAtLastError(void) { return OK; }
EXPORT cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return OK; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return OK; }
EXPORT cudaError_t cudaDeviceSynchronize(void) { UNLESS_CAPTURING; return OK; }

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    const struct gpu *g = gpu();
    memset(p, 0, sizeof *p);
    strcpy(p->name, g->name);
    p->major = g->major;
    p->minor = g->minor;
    p->multiProcessorCount = g->processors;
    p->maxThreadsPerMultiProcessor = g->threads;
    p->sharedMemPerBlock = 48 << 10;
    p->sharedMemPerBlockOptin = g->shared_block;
    p->sharedMemPerMultiprocessor = g->shared_processor;
    p->l2CacheSize = g->l2;
    p->totalGlobalMem = 24ull << 30;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->textureAlignment = 512;
    return OK;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    switch (attribute) {
        case cudaDevAttrComputeCapabilityMajor: *value = gpu()->major; break;
        case cudaDevAttrComputeCapabilityMinor: *value = gpu()->minor; break;
        case cudaDevAttrMultiProcessorCount: *value = gpu()->processors; break;
        case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = gpu()->shared_block; break;
        default: *value = 1024;
    }
    return OK;
}

// Memory. A device's is aligned as CUDA's is, and zero. Pages that nobody writes to take none of the host's: compilers
// allocate what a program works on. What calloc gave stands before the address.
enum { ALIGNMENT = 512 };
EXPORT cudaError_t cudaMalloc(void **memory, size_t size) {
    *memory = NULL;
    if (!size) return OK;
    char *given = calloc(1, size + 2 * ALIGNMENT);
    if (!given) return cudaErrorMemoryAllocation;
    void **aligned = (void **)(((uintptr_t)given / ALIGNMENT + 1) * ALIGNMENT);
    aligned[-1] = given;
    *memory = aligned;
    return OK;
}
EXPORT cudaError_t cudaFree(void *memory) {
    if (memory) free(((void **)memory)[-1]);
    return OK;
}
EXPORT cudaError_t cudaMallocAsync(void **memory, size_t size, cudaStream_t s) { return cudaMalloc(memory, size); }
EXPORT cudaError_t cudaFreeAsync(void *memory, cudaStream_t s) { return cudaFree(memory); }
EXPORT cudaError_t cudaHostAlloc(void **memory, size_t size, unsigned flags) { *memory = malloc(size); return OK; }
EXPORT cudaError_t cudaFreeHost(void *memory) { free(memory); return OK; }
EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = 20ull << 30;
    *total = 24ull << 30;
    return OK;
}
EXPORT cudaError_t cudaMemcpy(void *target, const void *source, size_t size, enum cudaMemcpyKind kind) {
    UNLESS_CAPTURING;
    memmove(target, source, size);
    return OK;
}
EXPORT cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t size, enum cudaMemcpyKind kind,
                                   cudaStream_t s) {
    return submit((struct work){target, source, 0, size});
}
EXPORT cudaError_t cudaMemsetAsync(void *target, int value, size_t size, cudaStream_t s) {
    return submit((struct work){target, NULL, value, size});
}
EXPORT cudaError_t cudaMemset(void *target, int value, size_t size) { return cudaMemsetAsync(target, value, size, 0); }
EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *memory) {
    memset(a, 0, sizeof *a);
    a->type = cudaMemoryTypeDevice;
    a->devicePointer = (void *)memory;
    return OK;
}

// Kernels that torch brings.
EXPORT cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **a, size_t shared, cudaStream_t s) {
    stand_in_launched();
    return OK;
}
// What <<<...>>> becomes from CUDA 13 on.
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **a, size_t shared, cudaStream_t s) {
    stand_in_launched();
    return OK;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) { *kernel = (cudaKernel_t)f; return OK; }
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *f, void **a) {
    stand_in_launched();
    return OK;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void *f, enum cudaFuncAttribute attribute, int value) { return OK; }
EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->ptxVersion = a->binaryVersion = 10 * gpu()->major + gpu()->minor;
    return OK;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *f, int block, size_t shared) {
    *count = 2;
    return OK;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *f, int block,
                                                                          size_t shared, unsigned flags) {
    *count = 2;
    return OK;
}

// Streams and events.
static void *handle(void) { return (void *)(handles += 64); }
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *low, int *high) { *low = 0; *high = -5; return OK; }
EXPORT cudaError_t cudaStreamCreate(cudaStream_t *s) { *s = handle(); return OK; }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned flags) { *s = handle(); return OK; }
EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int p) { *s = handle(); return OK; }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t s) { return OK; }
EXPORT cudaError_t cudaStreamQuery(cudaStream_t s) {
    return capturing && s == captured_stream ? refused(cudaErrorStreamCaptureUnsupported) : OK;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) { return cudaStreamQuery(s); }
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t e, unsigned flags) { return OK; }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) {
    *e = (cudaEvent_t)calloc(1, sizeof(struct event));
    return OK;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t e) { free(e); return OK; }
EXPORT cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) {
    ((struct event *)e)->captured = capturing != NOT_CAPTURING;
    return OK;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { return cudaEventRecord(e, s); }
EXPORT cudaError_t cudaEventQuery(cudaEvent_t e) {
    if (((struct event *)e)->captured) return refused(cudaErrorCapturedEvent);
    UNLESS_CAPTURING;
    return OK;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t e) {
    if (((struct event *)e)->captured) return refused(cudaErrorCapturedEvent);
    UNLESS_CAPTURING;
    return OK;
}
// The same for everything: a compiler that tries several kernels takes the first one.
EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 200.0f; return OK; }

// Graphs: a captured one knows how many kernels it launches, and its copies and fills.
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    if (capturing) return cudaErrorIllegalState;
    capturing = mode == cudaStreamCaptureModeRelaxed ? CAPTURING_RELAXED : CAPTURING;
    captured = (struct graph){0};
    invalid = 0;
    captured_stream = s;
    return OK;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g) {
    capturing = NOT_CAPTURING;
    *g = NULL;
    if (invalid) return cudaErrorStreamCaptureInvalidated;
    *g = memcpy(malloc(sizeof captured), &captured, sizeof captured);
    return OK;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return OK;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id, cudaGraph_t *g, const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *count) {
    *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    if (id) *id = 7;
    if (g) *g = handle();
    if (count) *count = 0;
    return OK;
}
EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return OK; }
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t *made, cudaGraph_t g, unsigned long long flags) {
    struct graph copy = copy_of((struct graph *)g);
    *made = memcpy(malloc(sizeof copy), &copy, sizeof copy);
    return OK;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t g, unsigned long long flags) {
    return cudaGraphInstantiate(made, g, flags);
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t s) {
    const struct graph *made = (struct graph *)g;
    launches += made->launches;
    for (long i = 0; i < made->count; i++) run(made->works[i]);
    return OK;
}
EXPORT cudaError_t cudaGraphUpload(cudaGraphExec_t g, cudaStream_t s) { return OK; }
static void forget(void *g) { if (g) free(((struct graph *)g)->works); free(g); }
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t g) { forget(g); return OK; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) { forget(g); return OK; }
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return OK; }
EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t g, const char *path, unsigned flags) { return OK; }
EXPORT cudaError_t cudaUserObjectCreate(cudaUserObject_t *o, void *p, cudaHostFn_t destroy, unsigned count,
                                        unsigned flags) {
    *o = handle();
    return OK;
}
EXPORT cudaError_t cudaGraphRetainUserObject(cudaGraph_t g, cudaUserObject_t o, unsigned count, unsigned flags) {
    return OK;
}
