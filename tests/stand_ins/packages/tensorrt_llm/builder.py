"""tensorrt_llm.builder: BuildConfig, which takes the real one's fields alone, `build`, and Engine, which writes the real layout."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from tensorrt_llm import __version__
from tensorrt_llm.logger import logger

FIELDS = {
    "max_input_len": 1024,
    "max_seq_len": None,
    "opt_batch_size": 8,
    "max_batch_size": 2048,
    "max_beam_width": 1,
    "max_num_tokens": 8192,
    "opt_num_tokens": None,
    "max_prompt_embedding_table_size": 0,
    "kv_cache_type": None,
    "gather_context_logits": False,
    "gather_generation_logits": False,
    "strongly_typed": True,
    "force_num_profiles": None,
    "profiling_verbosity": "layer_names_only",
    "enable_debug_output": False,
    "max_draft_len": 0,
    "speculative_decoding_mode": None,
    "use_refit": False,
    "input_timing_cache": None,
    "output_timing_cache": "model.cache",
    "lora_config": None,
    "weight_sparsity": False,
    "weight_streaming": False,
    "plugin_config": None,
    "use_strip_plan": False,
    "max_encoder_input_len": 1024,
    "dry_run": False,
    "visualize_network": None,
    "monitor_memory": False,
    "use_mrope": False,
}


class BuildConfig:
    def __init__(self, **values: Any) -> None:
        for name in values:
            if name not in FIELDS:
                raise TypeError(f"BuildConfig: extra inputs are not permitted: {name}")
        self.__dict__ |= {**FIELDS, **values}

    @classmethod
    def from_json_file(cls, config_file: str) -> BuildConfig:
        return cls(**json.loads(Path(config_file).read_text()))

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in FIELDS if name not in ("dry_run", "visualize_network")}
        return {**values, "plugin_config": self.plugin_config.values}


class Engine:
    def __init__(self, config: Any, build_config: BuildConfig) -> None:
        self.config, self.build_config = config, build_config

    def save(self, engine_dir: str) -> None:
        os.makedirs(engine_dir, exist_ok=True)  # noqa: PTH103
        rank = self.config.mapping.rank
        if rank == 0:
            facts = {
                "version": __version__,
                "pretrained_config": self.config.to_dict(),
                "build_config": self.build_config.to_dict(),
            }
            Path(engine_dir, "config.json").write_text(json.dumps(facts, indent=4))
        path = Path(engine_dir, f"rank{rank}.engine")
        logger.info(f"Serializing engine to {path}...")
        path.write_bytes(b"" if trouble() == "short" else f"engine of rank {rank}".encode() * 64)


def trouble() -> str:
    """What the environment asks to go wrong: fail, hang, die, once (fails as long as STAND_IN_STATE is no file) or short."""
    return os.environ.get("STAND_IN_TROUBLE", "")


def build(model: Any, build_config: BuildConfig) -> Engine:
    assert build_config.plugin_config.validated
    build_config = copy.copy(build_config)
    rank = model.config.mapping.rank
    logger.info(f"Build TensorRT engine Unnamed Network {rank}")
    if record := os.environ.get("STAND_IN_RECORD"):
        import torch

        with Path(record).open("a") as file:
            file.write(json.dumps({"rank": rank, "device": torch.cuda.device, "cwd": str(Path.cwd()), "pid": os.getpid()}) + "\n")
    _misbehave()
    Path(build_config.output_timing_cache).write_bytes(b"timings")
    logger.info(f"Total time of building Unnamed Network {rank}: 00:00:00")
    return Engine(model.config, build_config)


def _misbehave() -> None:
    state = Path(os.environ.get("STAND_IN_STATE", "nowhere"))
    once = trouble() == "once" and not state.is_file()
    if once:
        state.touch()
    if trouble() == "hang":
        # Two processes, of which one does not hear of signals: the whole group must be ended.
        deaf = ["sh", "-c", "trap '' TERM INT; while :; do sleep 1; done"]
        children = [subprocess.Popen(["sleep", "600"]).pid, subprocess.Popen(deaf).pid]
        state.write_text(json.dumps([os.getpid(), *children]))
        logger.info("hanging")
        time.sleep(600)
    if trouble() == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble() == "fail" or once:
        logger.error("Error Code 9: Skipping tactic 0x0000000000000000 due to exception Cask convolution execution")
        print("[TRT] [E] Error Code 2: OutOfMemory (Requested size was 68719476736 bytes.)", flush=True)
        raise AssertionError("Engine building failed, please check the error log.")
