"""LoHa, LoKr, FourierFT, WaveFT, C3A, GraLoRA, MiSS, and those whose frozen matrices all layers share."""

from __future__ import annotations

from typing import Any

from inlay_peft_bridge.converter import Config, Converter
from inlay_peft_bridge.report import refused

REBUILT = {"r": "rank", "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout",
           "use_effective_conv2d": "effective_conv"}  # fmt: skip
PATTERNS = {"rank_pattern": "r", "alpha_pattern": "alpha"}
STARTS = frozenset({"init_weights"})

LOHA = Converter(
    "LOHA",
    "loha",
    {
        "hada_w1_a": "up1", "hada_w1_b": "down1", "hada_w2_a": "up2", "hada_w2_b": "down2",
        "hada_t1": "core1", "hada_t2": "core2",
    },
    settings=REBUILT,
    starts=STARTS,
    patterns=PATTERNS,
)  # fmt: skip

LOKR = Converter(
    "LOKR",
    "lokr",
    {
        "lokr_w1": "w1", "lokr_w1_a": "w1_up", "lokr_w1_b": "w1_down", "lokr_w2": "w2", "lokr_w2_a": "w2_up",
        "lokr_w2_b": "w2_down", "lokr_t2": "w2_core",
    },
    settings={
        **REBUILT, "decompose_both": "decompose_both", "decompose_factor": "decompose_factor",
    },
    read_config=lambda config: {"rank_dropout_scale": not config.get("rank_dropout_scale", False)},
    write_config=lambda settings: {"rank_dropout_scale": False},
    reads=frozenset({"rank_dropout_scale"}),
    starts=STARTS,
    patterns=PATTERNS,
)  # fmt: skip

FOURIERFT = Converter(
    "FOURIERFT",
    "fourierft",
    {"fourierft_spectrum": "spectrum"},
    settings={"n_frequency": "n_frequency", "scaling": "scaling", "random_loc_seed": "seed"},
    starts=STARTS,
    patterns={"n_frequency_pattern": "n_frequency"},
)

WAVEFT = Converter(
    "WAVEFT",
    "waveft",
    {"waveft_spectrum": "spectrum"},
    settings={
        "n_frequency": "n_frequency", "scaling": "scaling", "random_loc_seed": "seed",
        "wavelet_family": "wavelet", "use_idwt": "use_idwt",
    },
    starts=frozenset({"init_weights", "waveft_dropout"}),
    patterns={"n_frequency_pattern": "n_frequency"},
)  # fmt: skip

C3A = Converter(
    "C3A",
    "c3a",
    {"c3a_kernel": "kernel"},
    settings={"block_size": "block_size"},
    starts=STARTS,
    patterns={"block_size_pattern": "block_size"},
)

GRALORA = Converter(
    "GRALORA",
    "gralora",
    {
        "gralora_A": "down", "gralora_B": "up",
        "gralora_A_general.weight": "hybrid_down", "gralora_B_general.weight": "hybrid_up",
    },
    settings={
        "r": "rank", "alpha": "alpha", "gralora_k": "k", "hybrid_r": "hybrid_rank",
        "gralora_dropout": "dropout",
    },
    starts=STARTS,
)  # fmt: skip


def read_miss(config: Config) -> dict[str, Any]:
    mode = config.get("init_weights", True)
    return {"mode": mode if mode in ("bat", "mini") else "balance"}


def write_miss(settings: Config) -> dict[str, Any]:
    if settings["mode"] == "bat" and settings["dropout"]:
        raise refused(
            "peft's MiSS of this mode has no dropout", saw=f"dropout={settings['dropout']}",
            do="train without it, or merge the adapter: inlay merge",
        )  # fmt: skip
    return {"init_weights": True if settings["mode"] == "balance" else settings["mode"]}


MISS = Converter(
    "MISS",
    "miss",
    {"miss_block": "block"},
    settings={"r": "rank", "mini_r": "mini_rank", "miss_dropout": "dropout"},
    read_config=read_miss,
    write_config=write_miss,
    reads=frozenset({"init_weights"}),
)

VERA = Converter(
    "VERA",
    "vera",
    {"vera_lambda_d": "lambda_d", "vera_lambda_b": "lambda_b"},
    settings={
        "r": "rank", "vera_dropout": "dropout", "d_initial": "d_initial", "projection_prng_key": "key",
    },
    read_config=lambda config: {"save_projection": True},
    write_config=lambda settings: {"save_projection": True},
    reads=frozenset({"save_projection"}),
    starts=STARTS,
    shared={"vera_A": "common.A", "vera_B": "common.B"},
)  # fmt: skip

RANDLORA = Converter(
    "RANDLORA",
    "randlora",
    {"randlora_lambda": "scales", "randlora_gamma": "gains"},
    settings={
        "r": "rank", "randlora_alpha": "alpha", "randlora_dropout": "dropout", "projection_prng_key": "key",
    },
    read_config=lambda config: {"save_projection": True, "bases": bases(config)},
    write_config=lambda settings: {
        "save_projection": True,
        "sparse": settings["bases"] == "sparse",
        "very_sparse": settings["bases"] == "very_sparse",
    },
    reads=frozenset({"save_projection", "sparse", "very_sparse"}),
    starts=STARTS,
    shared={"randlora_A": "common.A", "randlora_B": "common.B"},
    repeats=True,
    write_shared=lambda name, tensor: tensor[:, None] if name.endswith("A") else tensor,
)  # fmt: skip


def bases(config: Config) -> str:
    """Return how the frozen matrices were drawn."""
    return "very_sparse" if config.get("very_sparse") else "sparse" if config.get("sparse") else "uniform"


VBLORA = Converter(
    "VBLORA",
    "vblora",
    {"vblora_logits_A": "down.logits", "vblora_logits_B": "up.logits"},
    settings={
        "r": "rank", "num_vectors": "num_vectors", "vector_length": "vector_length", "topk": "top_k",
        "vblora_dropout": "dropout", "init_vector_bank_bound": "bound", "init_logits_std": "logits_std",
    },
    shared={"vblora_vector_bank": "common.bank"},
)  # fmt: skip

DELORA = Converter(
    "DELORA",
    "delora",
    {"delora_A": "down", "delora_B": "up", "delora_lambda": "strength", "delora_w_norm": "norms"},
    settings={"r": "rank", "delora_lambda": "strength", "module_dropout": "dropout"},
    read_config=lambda config: {"start": "zero"},
    write_config=lambda settings: from_zero(settings),
    starts=STARTS,
    buffers=frozenset({"norms"}),
    patterns={"rank_pattern": "r", "lambda_pattern": "delora_lambda"},
)


def from_zero(settings: Config) -> dict[str, Any]:
    if settings["start"] != "zero":
        raise refused(
            "peft's DeLoRA has no start to subtract",
            saw=f"start={settings['start']!r}",
            do='train with start="zero", or write it as a LoRA: inlay.to_lora',
        )
    return {}
