"""The demo: a tiny random Gemma-2, its byte tokenizer and generated pairs; nothing is downloaded.

The model is a real Gemma-2 in structure (soft-caps, a sliding window that is shorter than the rows, grouped
heads) and goes through the same int8 path as a 9B; nothing in it was ever trained. A pair is two short
answers in one of six languages, one polite and one rude. The polite one wins, and one label in ten is turned
round, so no accuracy can go far above 0.90. Position carries no information, nor does length over all
languages together. The default run, the tests and the benchmarks use them.

The demo has its own lr: the recipe's 2e-4 is meant for a pretrained backbone and teaches this random one
nothing in 150 steps (accuracy .565); 5e-3 does. Nothing else differs from the defaults, alpha 4 with r 64
included.
"""

import threading

import numpy as np
import pandas as pd

DEMO_LR = 5e-3
DEMO_ROWS, HELD_OUT_ROWS = 2400, 600  # 2,400 rows are 150 steps
LABEL_NOISE = 0.1
DRAWING = threading.Lock()  # torch's generator is one for all threads

# language: questions, topics (the last two occur in held-out pairs only), answers, polite words, rude words
PHRASES = {
    "English": (
        ["How do I learn {}?", "Why is {} so hard?"],
        ["chess", "cooking", "algebra", "painting", "sailing", "singing", "fencing", "weaving"],
        [
            "Start with {} for ten minutes a day.",
            "Read one book on {}.",
            "For {}, find a teacher who is patient.",
        ],
        ["Happy to help, ask me more!", "You will do well, good luck.", "Thank you for asking."],
        ["What a stupid question.", "Stop wasting my time.", "You will fail, as always."],
    ),
    "Spanish": (
        ["¿Cómo aprendo {}?", "¿Por qué cuesta tanto {}?"],
        ["ajedrez", "cocina", "álgebra", "pintura", "vela", "canto", "esgrima", "costura"],
        ["Practica {} cada día.", "Lee un libro de {}.", "Para {}, busca un maestro con paciencia."],
        ["¡Con mucho gusto, pregunta más!", "Te irá bien, suerte.", "Gracias por preguntar."],
        ["Qué pregunta tan tonta.", "No me hagas perder el tiempo.", "Vas a fracasar."],
    ),
    "German": (
        ["Wie lerne ich {}?", "Warum ist {} so schwer?"],
        ["Schach", "Kochen", "Algebra", "Malen", "Segeln", "Singen", "Fechten", "Weben"],
        ["Übe {} jeden Tag zehn Minuten.", "Lies ein Buch über {}.", "Suche für {} einen geduldigen Lehrer."],
        ["Gern geschehen, frag ruhig weiter!", "Das schaffst du, viel Glück.", "Danke für die Frage."],
        ["Was für eine dumme Frage.", "Stiehl mir nicht die Zeit.", "Du wirst scheitern."],
    ),
    "Russian": (
        ["Как освоить {}?", "Чем трудны {}?"],
        ["шахматы", "танцы", "дроби", "краски", "лыжи", "песни", "шашки", "узоры"],
        ["Начни: {} и время.", "Тут {}: читай книгу.", "Найди того, кто знает {}."],
        ["Рад помочь!", "Удачи тебе.", "Спасибо!"],
        ["Глупый вопрос.", "Отстань уже.", "Не выйдет."],
    ),
    "Chinese": (
        ["怎么学{}?", "为什么{}这么难?"],
        ["下棋", "做饭", "代数", "画画", "航海", "唱歌", "击剑", "编织"],
        ["每天练习{}。", "读一本{}的书。", "学{}要找好老师。"],
        ["很高兴帮助你!", "祝你好运。", "谢谢提问。"],
        ["问题真蠢。", "别浪费我时间。", "你会失败。"],
    ),
    "Arabic": (
        ["كيف أتعلم {}؟", "لماذا {} صعب؟"],
        ["الشطرنج", "الطبخ", "الجبر", "الرسم", "الإبحار", "الغناء", "الخط", "النسج"],
        ["تدرب على {}.", "اقرأ عن {}.", "ابحث عن معلم {}."],
        ["يسعدني ذلك!", "حظا سعيدا.", "شكرا لك."],
        ["سؤال غبي.", "لا تضيع وقتي.", "سوف تفشل."],
    ),
}


def demo_pairs(rows: int, seed: int, held_out: bool = False) -> pd.DataFrame:
    """Generate `rows` pairs as data.py's table; held-out ones are about topics that training never sees."""
    rng = np.random.default_rng([seed, held_out])
    table = []
    for i in range(rows):
        language = list(PHRASES)[rng.integers(len(PHRASES))]
        questions, topics, answers, polite, rude = PHRASES[language]
        topic = rng.choice(topics[-2:] if held_out else topics[:-2])
        words = [polite, rude] if rng.random() < 0.5 else [rude, polite]  # so the position carries nothing
        first, second = (f"{rng.choice(answers).format(topic)} {rng.choice(w)}" for w in words)
        label = float((words[0] is polite) != (rng.random() < LABEL_NOISE))
        name = f"demo-held-out-{i}" if held_out else f"demo-{i}"
        table.append((name, rng.choice(questions).format(topic), first, second, label, language))
    return pd.DataFrame(table, columns=["id", "prompt", "response_a", "response_b", "label", "language"])


def tiny_config(**changes):
    """transformers' configuration of the tiny Gemma-2.

    initializer_range 0.2, not 0.02: with the usual value so little of its input passes through a random model
    that the demo stays at chance (accuracy .54).
    """
    from transformers import Gemma2Config

    settings = dict(
        vocab_size=260, hidden_size=64, intermediate_size=128, num_hidden_layers=2, sliding_window=64
    )
    settings |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16)
    settings |= dict(initializer_range=0.2, pad_token_id=0, eos_token_id=1, bos_token_id=2)
    return Gemma2Config(**{**settings, **changes})


def byte_tokenizer():
    """A tokenizer with one token a UTF-8 byte: any text works. Ids 0-3 are Gemma's pad, EOS, BOS, unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # 256 printable stand-ins, one a byte
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def write_tiny(folder: str, seed: int = 0, **changes) -> str:
    """Write the model and its tokenizer as an ordinary model folder, the same bytes for the same seed;
    returns the folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import Gemma2ForCausalLM

    with DRAWING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma2ForCausalLM(tiny_config(architectures=["Gemma2ForCausalLM"], **changes))
    # not model.save_pretrained: it writes nothing in all ranks but the first
    model.config.save_pretrained(folder)
    tensors = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}  # the embeddings' own
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
    byte_tokenizer().save_pretrained(folder)
    return str(folder)
