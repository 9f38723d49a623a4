// Stands in for the CUDA runtime, preloaded, so that torch traces fake tensors of a GPU where there is none.
// One device, one stream, no memory: nothing runs, and every call says that it has worked.
int cudaGetDeviceProperties(char *properties, int device) {
    *(int *)(properties + 360) = 9;  // cudaDeviceProp.major, there in CUDA 12 and 13; the caller has zeroed the rest
    return 0;
}
int cudaGetDeviceProperties_v2(char *properties, int device) { return cudaGetDeviceProperties(properties, device); }
int cudaDeviceGetAttribute(int *value, int attribute, int device) { *value = 1; return 0; }
int cudaGetDeviceCount(int *count) { *count = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = 13020; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = 13020; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status) { *status = 0; return 0; }
int cudaThreadExchangeStreamCaptureMode(int *mode) { return 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { *event = (void *)1; return 0; }
int cudaEventRecord(void *event, void *stream) { return 0; }
int cudaEventQuery(void *event) { return 0; }
int cudaEventDestroy(void *event) { return 0; }
int cudaEventSynchronize(void *event) { return 0; }
int cudaStreamWaitEvent(void *stream, void *event, unsigned flags) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
