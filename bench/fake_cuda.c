// Stands in for the CUDA driver, libcuda.so.1, where there is none: what torch asks it before any work.
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 0; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "a stand-in for the driver"; return 0; }
