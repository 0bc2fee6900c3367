// A GPU that is not there: what its runtime, its driver and its matrix library have in common.
#pragma once
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))

// Facts of the GPU, from FASTVAR_STAND_IN_GPU: "9.0,132,2048,232448,233472,52428800,H100".
struct gpu {
    int major, minor, processors, threads, shared_block, shared_processor, l2;
    char name[128];
};

static const struct gpu *gpu(void) {
    static struct gpu found;
    if (!found.major) {
        const char *text = getenv("FASTVAR_STAND_IN_GPU");
        if (!text || sscanf(text, "%d.%d,%d,%d,%d,%d,%d,%127[^\n]", &found.major, &found.minor, &found.processors,
                            &found.threads, &found.shared_block, &found.shared_processor, &found.l2, found.name) != 8) {
            fprintf(stderr, "FASTVAR_STAND_IN_GPU does not describe a GPU\n");
            abort();
        }
    }
    return &found;
}

// Kept by the runtime, which is loaded first: kernels that were launched.
enum { NOT_CAPTURING, CAPTURING, CAPTURING_RELAXED };
EXPORT void stand_in_launched(void);
EXPORT long stand_in_launches(void);
