# The CUDA part from kernels compiled ahead: EMOE_CUDA_KERNELS names an object file (scripts/kernels_cu12.py makes one for
# CUDA 12, which has no nvcc on PyPI), EMOE_CUDA_ROOT the folder with its CUDA's headers and static runtime.
find_path(EMOE_CUDA_ROOT_INCLUDE cuda_runtime_api.h PATHS ${EMOE_CUDA_ROOT} PATH_SUFFIXES include REQUIRED NO_DEFAULT_PATH)
find_library(EMOE_CUDART_STATIC libcudart_static.a PATHS ${EMOE_CUDA_ROOT} PATH_SUFFIXES lib lib64 REQUIRED NO_DEFAULT_PATH)
emoe_cuda_host_library(emoe_cuda)
target_include_directories(emoe_cuda SYSTEM PUBLIC ${EMOE_CUDA_ROOT_INCLUDE})
target_link_libraries(emoe_cuda PUBLIC ${EMOE_CUDA_KERNELS} ${EMOE_CUDART_STATIC} rt ${CMAKE_DL_LIBS} Threads::Threads)
message(STATUS "CUDA part: kernels of ${EMOE_CUDA_KERNELS}, runtime of ${EMOE_CUDART_STATIC}")
