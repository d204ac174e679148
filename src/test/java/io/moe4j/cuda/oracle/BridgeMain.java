package io.moe4j.cuda.oracle;

import io.moe4j.cuda.oracle.LibraryBridge.Library;
import jcuda.jcublas.JCublas2;
import jcuda.jcublas.cublasHandle;
import jcuda.jcudnn.JCudnn;
import jcuda.jcudnn.cudnnHandle;

/** Runs in a child JVM against stub libraries and prints what came back through the bridges. */
public final class BridgeMain {
    private BridgeMain() {}

    /** Loads both libraries and calls a function that is there and one that is not. */
    public static void main(String[] args) {
        LibraryBridge.statusLines().forEach(System.out::println);
        System.out.println(LibraryBridge.load(Library.CUBLAS).way());
        LibraryBridge.load(Library.CUBLAS);
        cublasHandle handle = new cublasHandle();
        int[] version = new int[1];
        System.out.println("cublasCreate " + JCublas2.cublasCreate(handle));
        System.out.println("cublasGetVersion " + JCublas2.cublasGetVersion(handle, version));
        System.out.println("cublas version " + version[0]);
        System.out.println("cublas missing " + JCublas2.cublasDestroy(handle));

        System.out.println(LibraryBridge.load(Library.CUDNN).way());
        System.out.println("cudnn version " + JCudnn.cudnnGetVersion());
        System.out.println("cudnn missing " + JCudnn.cudnnCreate(new cudnnHandle()));
        System.out.println("cudnn text " + JCudnn.cudnnGetErrorString(3));
    }
}
