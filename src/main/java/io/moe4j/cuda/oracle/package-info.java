/**
 * cuBLAS and cuDNN as independent witnesses: tests and benchmarks compare against them, layers do
 * not use them. {@link io.moe4j.cuda.oracle.LibraryBridge} makes JCuda's bindings for CUDA 12 and
 * cuDNN 8 work where only CUDA 13 and cuDNN 9 are installed.
 */
package io.moe4j.cuda.oracle;
