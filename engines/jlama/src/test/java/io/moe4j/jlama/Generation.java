package io.moe4j.jlama;

import com.github.tjake.jlama.model.AbstractModel;
import com.github.tjake.jlama.model.functions.Generator;
import com.github.tjake.jlama.safetensors.prompt.PromptContext;
import java.util.UUID;

/** Text of a model, greedily chosen, so that equal logits give equal text. */
final class Generation {
    static final String PROMPT = "the experts of a layer";

    private Generation() {}

    /** Up to {@code tokens} tokens, prompt included. */
    static String text(AbstractModel model, int tokens) {
        Generator.Response response =
                model.generate(
                        UUID.randomUUID(), PromptContext.of(PROMPT), 0f, tokens, (token, ms) -> {});
        return response.responseTextWithSpecialTokens;
    }

    /** Characters, one a token, that two texts have in common before they part. */
    static int common(String a, String b) {
        int at = 0;
        while (at < Math.min(a.length(), b.length()) && a.charAt(at) == b.charAt(at)) {
            at++;
        }
        return at;
    }
}
