"""Tiny random models with real tokenizers, made on the spot in well under a second.

    path = tiny.model_dir(tmp_path, arch="llama", template="chatml")
    model = AutoModelForCausalLM.from_pretrained(path); tokenizer = AutoTokenizer.from_pretrained(path)

The weights are random, so the text is noise, but everything around it is real: byte-level BPE, special tokens, chat
templates of four families, grouped-query attention, rotary positions. The templates are written after the public
ones and keep the quirk that each family is known for:

    chatml   the end-of-turn token is the eos token, a newline follows it
    llama3   a begin-of-text token, contents are stripped, nothing follows the end of turn
    qwen3    ChatML that drops the reasoning of old turns and can put an empty think block into the generation prompt
    tools    has a `tool` role, refuses roles it does not know; the end of turn is NOT the eos token
"""

import functools
from pathlib import Path

CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

LLAMA3 = """{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}"""

QWEN3 = """{%- set ns = namespace(last=messages | length - 1, found=false) -%}
{%- for message in messages[::-1] -%}
{%- if not ns.found and message.role == 'user' -%}
{%- set ns.found = true -%}{%- set ns.last = (messages | length - 1) - loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set content = message.content -%}{%- set reasoning = '' -%}
{%- if '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\n') -%}
{%- endif -%}
{%- if loop.index0 > ns.last and (loop.last or reasoning) -%}
{{- '<|im_start|>assistant\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') -}}
{%- else -%}
{{- '<|im_start|>assistant\n' + content -}}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

TOOLS = """{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] in ['system', 'user', 'assistant'] -%}
{{- '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' -}}
{%- elif message['role'] == 'tool' -%}
{{- '<|tool|>\n<result>' + message['content'] + '</result><|end|>\n' -}}
{%- else -%}
{{- raise_exception('unknown role ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}"""

# template -> (chat template, special tokens, bos, eos, the token that ends a turn)
TEMPLATES = {
    "chatml": (CHATML, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>"),
    "llama3": (LLAMA3, ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                        "<|eot_id|>"], "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "qwen3": (QWEN3, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", "<|im_end|>"),
    "tools": (TOOLS, ["<|endoftext|>", "<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"],
              "<s>", "<|endoftext|>", "<|end|>"),
}

CORPUS = [
    "Find total.\n```bash\ngrep -rn 'def total' .\n```\n", "exit 0\n./shop/cart.py:12:def total(items):\n",
    "The test fails.\n```bash\npython -m pytest -q tests/test_cart.py\n```\n", "```bash\ncat shop/cart.py\n```",
    "def total(items):\n    return sum(item.price for item in items)\n", "```bash\nsubmit\n```\n",
    "<think>\n\n</think>\n\n", "You fix the bug in the repository. One bash command per reply.",
    "system user assistant tool\n", "exit 1\nAssertionError",
]


@functools.cache
def _bpe(specials: tuple[str, ...], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(specials), show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(CORPUS * 3, trainer)
    return bpe


def tokenizer(template: str = "chatml", vocab_size: int = 480):
    """A transformers tokenizer with the chat template of that family (no model needed)."""
    from transformers import PreTrainedTokenizerFast

    chat_template, specials, bos, eos, _ = TEMPLATES[template]
    pad = specials[1] if specials[0] == bos else specials[0]  # generate() takes pad tokens in a prompt for padding
    made = PreTrainedTokenizerFast(tokenizer_object=_bpe(tuple(specials), vocab_size), bos_token=bos, eos_token=eos,
                                   pad_token=pad, additional_special_tokens=specials,
                                   clean_up_tokenization_spaces=False, model_max_length=4096)
    made.chat_template = chat_template
    return made


def model_dir(tmp_path, arch: str = "llama", template: str = "chatml", seed: int = 0, layers: int = 2,
              hidden: int = 64) -> str:
    """A directory that AutoModelForCausalLM and AutoTokenizer load: random weights by seed, a trained tokenizer."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    target = Path(tmp_path) / f"tiny-{arch}-{template}-{layers}x{hidden}-{seed}"
    if (target / "config.json").exists():
        return str(target)
    made = tokenizer(template)
    end = made.convert_tokens_to_ids(TEMPLATES[template][4])
    # a wide initialisation: with the usual 0.02 all logits are nearly equal and greedy text is one token for ever
    shape = dict(vocab_size=len(made), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.2,
                 bos_token_id=made.bos_token_id, eos_token_id=made.eos_token_id, pad_token_id=made.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if arch == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True))
        elif arch == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=16, tie_word_embeddings=False))
        else:
            raise ValueError(f"arch {arch!r}: llama or qwen3")
    # as the public models do: the token that ends a turn is among the eos ids of the generation config
    model.generation_config = GenerationConfig(bos_token_id=made.bos_token_id, pad_token_id=made.pad_token_id,
                                               eos_token_id=sorted({made.eos_token_id, end}))
    model.save_pretrained(target)
    made.save_pretrained(target)
    return str(target)
