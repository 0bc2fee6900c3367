"""The environment variables of every training process."""

# Keep freed memory in the process: handing big tensors back and asking for them anew costs more than the
# arithmetic on machines whose page faults are slow (glibc only; ignored elsewhere).
VARIABLES = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_NUM_THREADS": "1",  # the training programs bring their own threads
}
