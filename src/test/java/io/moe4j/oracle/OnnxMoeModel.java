package io.moe4j.oracle;

import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;

/**
 * An ONNX model with a single {@code com.microsoft.MoE} node, encoded by hand: there is no Java
 * library that writes ONNX. Field numbers are those of onnx.proto.
 */
final class OnnxMoeModel {
    private static final int FLOAT = 1;

    private final ByteArrayOutputStream node = new ByteArrayOutputStream();
    private final ByteArrayOutputStream graph = new ByteArrayOutputStream();

    OnnxMoeModel(int topK, boolean normalise, float alpha, float beta, float limit) {
        intAttribute("k", topK);
        intAttribute("normalize_routing_weights", normalise ? 1 : 0);
        intAttribute("swiglu_fusion", 1);
        stringAttribute("activation_type", "swiglu");
        floatAttribute("activation_alpha", alpha);
        floatAttribute("activation_beta", beta);
        if (Float.isFinite(limit)) {
            floatAttribute("swiglu_limit", limit);
        }
    }

    /** Adds an input of the node that the caller feeds. */
    OnnxMoeModel input(String name, long... shape) {
        string(node, 1, name);
        message(graph, 11, valueInfo(name, shape));
        return this;
    }

    /** Adds an input of the node that is stored in the model; null data for an absent one. */
    OnnxMoeModel constant(String name, float[] data, long... shape) {
        string(node, 1, data == null ? "" : name);
        if (data != null) {
            message(graph, 5, tensor(name, data, shape));
        }
        return this;
    }

    /** The serialized ModelProto. */
    byte[] build(String output, long... shape) {
        string(node, 2, output);
        string(node, 4, "MoE");
        string(node, 7, "com.microsoft");
        message(graph, 12, valueInfo(output, shape));
        ByteArrayOutputStream whole = new ByteArrayOutputStream();
        message(whole, 1, node);
        string(whole, 2, "moe");
        whole.writeBytes(graph.toByteArray());
        ByteArrayOutputStream model = new ByteArrayOutputStream();
        number(model, 1, 9);
        message(model, 7, whole);
        message(model, 8, opset("", 18));
        message(model, 8, opset("com.microsoft", 1));
        return model.toByteArray();
    }

    private void intAttribute(String name, long value) {
        ByteArrayOutputStream attribute = new ByteArrayOutputStream();
        string(attribute, 1, name);
        number(attribute, 3, value);
        number(attribute, 20, 2);
        message(node, 5, attribute);
    }

    private void floatAttribute(String name, float value) {
        ByteArrayOutputStream attribute = new ByteArrayOutputStream();
        string(attribute, 1, name);
        tag(attribute, 2, 5);
        attribute.writeBytes(
                ByteBuffer.allocate(4).order(ByteOrder.LITTLE_ENDIAN).putFloat(value).array());
        number(attribute, 20, 1);
        message(node, 5, attribute);
    }

    private void stringAttribute(String name, String value) {
        ByteArrayOutputStream attribute = new ByteArrayOutputStream();
        string(attribute, 1, name);
        string(attribute, 4, value);
        number(attribute, 20, 3);
        message(node, 5, attribute);
    }

    private static ByteArrayOutputStream opset(String domain, long version) {
        ByteArrayOutputStream opset = new ByteArrayOutputStream();
        string(opset, 1, domain);
        number(opset, 2, version);
        return opset;
    }

    private static ByteArrayOutputStream valueInfo(String name, long[] shape) {
        ByteArrayOutputStream dims = new ByteArrayOutputStream();
        for (long extent : shape) {
            ByteArrayOutputStream dim = new ByteArrayOutputStream();
            number(dim, 1, extent);
            message(dims, 1, dim);
        }
        ByteArrayOutputStream tensorType = new ByteArrayOutputStream();
        number(tensorType, 1, FLOAT);
        message(tensorType, 2, dims);
        ByteArrayOutputStream type = new ByteArrayOutputStream();
        message(type, 1, tensorType);
        ByteArrayOutputStream info = new ByteArrayOutputStream();
        string(info, 1, name);
        message(info, 2, type);
        return info;
    }

    private static ByteArrayOutputStream tensor(String name, float[] data, long[] shape) {
        ByteArrayOutputStream tensor = new ByteArrayOutputStream();
        for (long extent : shape) {
            number(tensor, 1, extent);
        }
        number(tensor, 2, FLOAT);
        string(tensor, 8, name);
        ByteBuffer raw = ByteBuffer.allocate(data.length * 4).order(ByteOrder.LITTLE_ENDIAN);
        raw.asFloatBuffer().put(data);
        bytes(tensor, 9, raw.array());
        return tensor;
    }

    private static void string(ByteArrayOutputStream to, int field, String value) {
        bytes(to, field, value.getBytes(StandardCharsets.UTF_8));
    }

    private static void message(ByteArrayOutputStream to, int field, ByteArrayOutputStream value) {
        bytes(to, field, value.toByteArray());
    }

    private static void bytes(ByteArrayOutputStream to, int field, byte[] value) {
        tag(to, field, 2);
        varint(to, value.length);
        to.writeBytes(value);
    }

    private static void number(ByteArrayOutputStream to, int field, long value) {
        tag(to, field, 0);
        varint(to, value);
    }

    private static void tag(ByteArrayOutputStream to, int field, int wireType) {
        varint(to, (long) field << 3 | wireType);
    }

    private static void varint(ByteArrayOutputStream to, long value) {
        while ((value & ~0x7fL) != 0) {
            to.write((int) (value & 0x7f | 0x80));
            value >>>= 7;
        }
        to.write((int) value);
    }
}
