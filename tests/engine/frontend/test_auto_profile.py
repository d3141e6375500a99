"""`"profile": "auto"`: found where it should be, made once, and never silently left out."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig, AutoProcessor

from sparsemm_vllm import environment
from sparsemm_vllm.budget.config_hash import config_hash
from sparsemm_vllm.budget.profile import HeadProfile, ProfileError, save_profile
from sparsemm_vllm.commands.server import free_port
from sparsemm_vllm.engine.frontend import auto_profile, profile_cache
from sparsemm_vllm.engine.frontend.auto_profile import last_lines, profile_command, run_profiler
from sparsemm_vllm.profiler.engine import check_model, open_engine
from sparsemm_vllm.reader import reader_folder
from support.tiny import make_llava, skewed_profile

# Stands for `sparsemm profile`: writes the profile beside it, and a line for each time it runs.
STAND_IN = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
with (here / "runs").open("a") as runs:
    print(*sys.argv[1:], file=runs)
(here / "environment").write_text(json.dumps(dict(os.environ)))
print("profiling", end="\\r", flush=True)
time.sleep({seconds})
while {wait_for!r} and not (here / {wait_for!r}).exists():
    time.sleep(0.1)
{fail}
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_bytes((here / "made.json").read_bytes())
print("profile ready")
"""
FAIL = "print('\\x1b[31mno room\\x1b[0m for the model'); sys.exit(3)"


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def made(llava: Path) -> HeadProfile:
    digest = config_hash(AutoConfig.from_pretrained(llava))
    return skewed_profile().model_copy(update={"config_hash": digest})


class Program:
    """The stand-in, and what became of it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "sparsemm"
        self.write()

    def write(self, fail: str = "", seconds: float = 0, wait_for: str = "") -> None:
        """How it runs: how long, until which file is beside it, and how it fails."""
        text = STAND_IN.format(python=sys.executable, fail=fail, seconds=seconds, wait_for=wait_for)
        self.path.write_text(text)
        self.path.chmod(0o755)

    @property
    def runs(self) -> list[str]:
        file = self.path.parent / "runs"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the last run."""
        return json.loads((self.path.parent / "environment").read_text())


@pytest.fixture
def program(tmp_path: Path, made: HeadProfile, monkeypatch: pytest.MonkeyPatch) -> Program:
    folder = tmp_path / "bin"
    folder.mkdir()
    (tmp_path / "tmp").mkdir()
    save_profile(made, folder / "made.json")
    stand_in = Program(folder)
    monkeypatch.setattr(auto_profile, "program", lambda *_: str(stand_in.path))
    monkeypatch.setenv("SPARSEMM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(profile_cache.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return stand_in


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    for module in (auto_profile, profile_cache):
        for level in ("info", "warning"):
            monkeypatch.setattr(module.logger, level, lambda text, *args: lines.append(text % args))
    return lines


def engine_args(model: Path, profile: Any = "auto", **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    defaults: dict[str, Any] = {
        "attention_backend": "SPARSEMM",
        "max_model_len": 512,
        "max_num_seqs": 8,
        "dtype": "float32",
        "additional_config": {"sparsemm": {"profile": profile}},
    }
    return EngineArgs(model=str(model), **(defaults | options))


def build(model: Path, profile: Any = "auto", **options: Any) -> Any:
    """The setting that reaches the engine."""
    config = engine_args(model, profile, **options).create_engine_config()
    return config.additional_config["sparsemm"]["profile"]


def test_made_once_and_read_from_then_on(
    llava: Path, program: Program, made: HeadProfile, said: list[str], capfd: Any
) -> None:
    expected = made.model_dump(mode="json")
    assert build(llava) == expected
    assert len(program.runs) == 1
    assert "One is made now" in said[0]
    assert '"none"' in said[0]
    assert "profiling\rprofile ready" in capfd.readouterr().err

    said.clear()
    assert build(llava) == expected
    assert len(program.runs) == 1
    (line,) = said
    (file,) = environment.cache_folder().glob("*.json")
    assert str(file) in line
    assert file.name.startswith("tiny-")


def test_the_program_gets_the_models_options(llava: Path, program: Program) -> None:
    build(llava, hf_overrides={"architectures": ["LlavaForConditionalGeneration"]})
    (arguments,) = program.runs
    assert arguments.startswith(f"profile {llava} --out ")
    for part in ("--data ocr", "--mode forced", "--dtype float32", "--max-model-len 512"):
        assert part in arguments
    assert '--hf-overrides {"architectures": ["LlavaForConditionalGeneration"]}' in arguments
    assert "--max-num-seqs" not in arguments, "an option of serving"


@pytest.mark.parametrize(
    ("size", "pictures"), [(112, "ocr"), (224, "ocr"), (336, "ocr-448"), (None, "ocr-448")]
)
def test_pictures_suit_what_the_model_sees(size: int | None, pictures: str) -> None:
    config = SimpleNamespace(image_size=size) if size else SimpleNamespace()
    assert auto_profile.pictures_for(config) == pictures


# Of vLLM 0.32 and 0.33.
OPTIONS_OF_SERVING = """
_api_process_count _api_process_rank additional_config aggregate_engine_logging all2all_backend
allowed_local_media_path allowed_media_domains async_scheduling attention_backend attention_config
aux_output_config block_size collect_detailed_traces compilation_config convert
cp_kv_cache_interleave_size cudagraph_capture_sizes cudagraph_metrics custom_histogram_buckets
data_parallel_address data_parallel_backend data_parallel_external_lb data_parallel_hybrid_lb
data_parallel_multi_port_external_lb data_parallel_rank data_parallel_rpc_port data_parallel_size
data_parallel_size_local data_parallel_start_rank dbo_decode_token_threshold
dbo_prefill_token_threshold dcp_comm_backend dcp_kv_cache_interleave_size dcp_q_replicate
decode_context_parallel_size default_mm_loras diffusion_config disable_cascade_attn
disable_chunked_mm_input disable_hybrid_kv_cache_manager disable_log_stats
disable_nccl_for_dp_synchronization dp_sync_interval ec_manager_config ec_transfer_config
elastic_ep_max_dp_size enable_batch_sharded_sampling enable_chunked_prefill enable_cumem_allocator
enable_dbo enable_elastic_ep enable_ep_weight_filter enable_eplb enable_fault_tolerance
enable_flashinfer_autotune enable_hc_sp enable_layerwise_nvtx_tracing
enable_logging_iteration_details enable_lora enable_mamba_cache_stochastic_rounding
enable_mamba_shared_prefix_checkpoint enable_mfu_metrics enable_mixed_moe_lora_format
enable_mm_embeds enable_mm_processor_stats enable_moe_shared_loras enable_nccl_comm_suspend
enable_prefix_caching enable_prompt_embeds enable_return_routed_experts enable_shm_tensor_arena
enable_sleep_mode enable_tower_connector_lora enable_trace_replay enforce_eager engram_config
eplb_config expert_placement_strategy fail_on_environ_validation fault_tolerance_config
fully_sharded_loras gdn_prefill_backend generation_config interleave_mm_strings io_processor_plugin
ir_op_priority jit_monitor_mode jit_monitor_verbose kda_decode_backend kda_prefill_backend
kernel_config kv_cache_dtype kv_cache_dtype_skip_layers kv_cache_metrics kv_cache_metrics_sample
kv_events_config kv_offloading_backend kv_offloading_size kv_sharing_fast_prefill
kv_transfer_config language_model_only limit_mm_per_prompt log_config_file log_level logging_config
logits_processors logprobs_mode long_prefill_token_threshold long_prefill_token_threshold_adaptive
lora_dtype lora_target_modules mamba_backend mamba_block_size mamba_cache_dtype mamba_cache_mode
mamba_cache_philox_rounds mamba_config mamba_ssm_cache_dtype mamba_ssu_algorithm master_addr
master_port max_cpu_loras max_cudagraph_capture_size max_logprobs max_lora_cls_labels max_lora_rank
max_loras max_num_active_seqs max_num_batched_tokens max_num_queued_reqs max_num_queued_tokens
max_num_scheduled_tokens max_num_seqs max_parallel_loading_workers media_io_kwargs
mm_device_do_normalize mm_encoder_fp8_scale_save_margin mm_encoder_fp8_scale_save_path
mm_encoder_only mm_hasher_algorithm mm_ipc_gpu_memory_gb mm_processor_cache_gb
mm_processor_cache_type mm_processor_device mm_shm_cache_max_object_size_mb mm_tensor_ipc
model_weights monokernel nnodes node_rank num_gpu_blocks_override numa_bind numa_bind_cpus
numa_bind_nodes optimization_level otlp_traces_endpoint override_generation_config
per_request_spec_decode_metrics performance_mode pooler_config prefill_context_parallel_size
prefill_schedule_interval prefix_cache_retention_interval prefix_caching_hash_algo
prefix_match_unit profiler_config quantization_config ray_workers_use_nsight reasoning_config
reasoning_parser reasoning_parser_plugin renderer_num_workers replayssm_buffer_len
return_sampling_mask runner scheduler_cls scheduler_reserve_full_isl scheduling_policy seed
served_model_name show_hidden_metrics_for_version shutdown_timeout skip_tokenizer_init
sleep_mode_backend sleep_mode_offload_cudagraph sleep_preserve_parameter_names
sparse_indexer_topk_backend spec_method spec_model spec_tokens specialize_active_lora
speculative_config stream_interval structured_outputs_config swa_bounded_replay tokens_only
ubatch_size use_fp64_gumbel use_replayssm use_tqdm_on_load video_pruning_method video_pruning_rate
watchdog_config watermark watermark_config weight_transfer_config worker_cls worker_extension_cls
"""
# A value of each option that is none's default.
OPTIONS: dict[str, Any] = {
    "allow_deprecated_quantization": True,
    "code_revision": "v1",
    "config_format": "hf",
    "cpu_distributed_timeout_seconds": 7,
    "cpu_offload_gb": 1.5,
    "cpu_offload_params": {"experts", "mlp.up"},
    "device_ids": [1, 0],
    "disable_custom_all_reduce": True,
    "disable_sliding_window": True,
    "distributed_executor_backend": "mp",
    "distributed_timeout_seconds": 8,
    "download_dir": "/somewhere else",
    "dtype": "float32",
    "enable_expert_parallel": True,
    "gpu_memory_utilization": 0.5,
    "hf_config_path": "/configs",
    "hf_overrides": {"a": {"b": "c d"}},
    "ignore_patterns": ["original/*", "*.pth"],
    "kv_cache_memory_bytes": 1 << 20,
    "linear_backend": "triton",
    "load_format": "safetensors",
    "max_model_len": 512,
    "mm_encoder_attn_backend": "TORCH_SDPA",
    "mm_encoder_attn_dtype": "fp8",
    "mm_encoder_fp8_scale_path": "/scales.json",
    "mm_encoder_tp_mode": "data",
    "mm_processor_kwargs": {"max_pixels": 1000},
    "model_class_overrides": {"A": "module:B"},
    "model_impl": "vllm",
    "model_loader_extra_config": {"concurrency": 16, "distributed": True},
    "moe_backend": "triton",
    "offload_backend": "prefetch",
    "offload_group_size": 2,
    "offload_num_in_group": 2,
    "offload_params": {"w1"},
    "offload_prefetch_step": 2,
    "pipeline_parallel_size": 2,
    "pt_load_map_location": {"cuda": "cpu"},
    "quantization": "fp8",
    "revision": "main",
    "safetensors_load_strategy": "eager",
    "safetensors_prefetch_block_size": 1 << 10,
    "safetensors_prefetch_num_threads": 3,
    "skip_mm_profiling": True,
    "tensor_parallel_size": 2,
    "tokenizer_mode": "slow",
    "tokenizer_revision": "main",
    "trust_remote_code": True,
}


def read_back(given: Any) -> Any:
    """The options that vLLM reads from the profiler's command line."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    command = profile_command(given, Path("out.json"), "ocr")
    parser = FlexibleArgumentParser()
    EngineArgs.add_cli_args(parser)
    start = command.index("--samples") + 2
    return EngineArgs.from_cli_args(
        parser.parse_args(["--model", str(given.model), *command[start:]])
    )


def test_vllm_reads_the_options_back(llava: Path) -> None:
    options = OPTIONS | {"tokenizer": str(llava)}
    assert options.keys() == set(auto_profile.MODEL_OPTIONS)
    given = engine_args(llava, **options)
    read, default = read_back(given), type(given)(model=str(llava))
    for name in auto_profile.MODEL_OPTIONS:
        ours, theirs = getattr(given, name), getattr(read, name)
        assert type(ours)(theirs) == ours if isinstance(ours, set) else theirs == ours, name
        assert ours != getattr(default, name), f"{name}: this shows nothing"


@pytest.mark.parametrize(
    "options",
    [
        {"ignore_patterns": "*.pth"},
        {"pt_load_map_location": "cuda:1"},
        {"quantization": "fp8_per_tensor"},
        {"hf_token": True},
    ],
    ids=str,
)
def test_other_kinds_of_values(llava: Path, options: dict[str, Any]) -> None:
    given = engine_args(llava, **options)
    read = read_back(given)
    for name in options:
        ours, theirs = getattr(given, name), getattr(read, name)
        assert theirs in (ours, [ours]), "one pattern and a list of it are the same"


def test_every_option_of_vllm_was_looked_at() -> None:
    """One that a new vLLM brings may say which model is loaded, how or where."""
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in fields(EngineArgs)}
    passed_on = {*auto_profile.MODEL_OPTIONS, "model", "hf_token"}
    serving = set(OPTIONS_OF_SERVING.split())
    assert not passed_on & serving
    assert passed_on <= names
    assert names <= passed_on | serving, "pass it on, or list it as one of serving"


SECRET = "hf_" + "s" * 34


@pytest.mark.parametrize("token", [SECRET, True, False, None])
def test_a_token_is_on_no_command_line_and_in_no_log(
    llava: Path, program: Program, said: list[str], token: str | bool | None, monkeypatch: Any
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    program.write(fail=FAIL)
    with pytest.raises(ProfileError) as error:
        build(llava, hf_token=token)
    (arguments,) = program.runs
    assert ("--hf-token" in arguments) == bool(token)
    assert arguments.endswith("--hf-token") == bool(token)
    assert program.environment.get("HF_TOKEN") == (token if token == SECRET else None)
    assert ("HF_HUB_DISABLE_IMPLICIT_TOKEN" in program.environment) == (token is False)
    assert SECRET not in " ".join([arguments, str(error.value), *said])
    assert "HF_TOKEN" not in os.environ


def test_several_processes_make_one(llava: Path, program: Program, made: HeadProfile) -> None:
    program.write(seconds=1)
    args = engine_args(llava, made.model_dump(mode="json"))
    config = args.create_engine_config()
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def start() -> None:
        found = auto_profile.find_profile(config, args)
        results.put(found is not None and found.scores == made.scores)

    started = [fork.Process(target=start) for _ in range(4)]
    for process in started:
        process.start()
    assert [results.get(timeout=60) for _ in started] == [True] * 4
    for process in started:
        process.join()
    assert len(program.runs) == 1


def test_the_profiler_reads_the_model_with_the_token(
    llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    for reader in (AutoConfig, AutoProcessor):
        original = reader.from_pretrained

        def read(model: str, original: Any = original, **options: Any) -> Any:
            given.append(options)
            return original(model)

        monkeypatch.setattr(reader, "from_pretrained", read)
    check_model(str(llava), {"hf_token": True, "revision": "main", "dtype": "float32"})
    ours = given[:2]  # the processor may read the config once more
    assert ours == [{"revision": "main", "token": True}] * 2


EXTERNAL_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}


def told_by_launcher(rank: int) -> dict[str, str]:
    """What torchrun, and vLLM's offline data parallelism, put into a rank's environment."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1",
        "ROLE_RANK": str(rank), "ROLE_WORLD_SIZE": "2", "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "VLLM_DP_RANK": str(rank), "VLLM_DP_RANK_LOCAL": str(rank), "VLLM_DP_SIZE": "2",
        "VLLM_DP_MASTER_IP": "127.0.0.1", "VLLM_DP_MASTER_PORT": "1",
    }  # fmt: skip


def test_ranks_make_one_and_say_for_whom_they_wait(
    llava: Path, program: Program, made: HeadProfile, said: list[str], monkeypatch: Any
) -> None:
    """The program is none of them: it would wait for the other, which waits for it."""
    program.write(wait_for="seen")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM sets it, and leaves it so
    for module in (auto_profile, profile_cache):
        monkeypatch.setattr(module, "SAY_EVERY", 0.5)
    args = engine_args(llava, made.model_dump(mode="json"), **EXTERNAL_RANKS)
    config = args.create_engine_config()
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()

    def start(rank: int) -> None:
        os.environ.update(told_by_launcher(rank))
        found = auto_profile.find_profile(config, args)
        results.put((os.getpid(), found is not None and found.scores == made.scores, said))

    def see(text: str, *values: Any) -> None:
        said.append(text % values)
        if sum("waiting for process" in line for line in said) == 2:
            (program.path.parent / "seen").touch()

    monkeypatch.setattr(profile_cache.logger, "warning", see)
    ranks = [fork.Process(target=start, args=(rank,)) for rank in range(2)]
    for process in ranks:
        process.start()
    found = [results.get(timeout=60) for _ in ranks]
    for process in ranks:
        process.join()
    found.sort(key=lambda result: any("One is made now" in line for line in result[2]))
    (_, waited_ok, waited), (maker, made_ok, making) = found
    assert waited_ok
    assert made_ok
    assert any("is being made by process" in line for line in making)
    assert any(f"waiting for process {maker} on " in line for line in waited)
    (arguments,) = program.runs
    assert "--tensor-parallel-size 2" in arguments
    assert "external_launcher" not in arguments
    assert not told_by_launcher(0).keys() & program.environment.keys()
    assert not list(environment.cache_folder().glob("*.holder"))


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is one of torchrun's."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # vLLM sets it, and leaves it so
    for name, value in told_by_launcher(0).items():
        if not name.startswith("VLLM_DP"):
            monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("nodes", ["2", None])
def test_ranks_on_other_nodes_cannot_share_a_file(
    llava: Path, program: Program, said: list[str], nodes: str | None, monkeypatch: Any
) -> None:
    if nodes:
        monkeypatch.setenv("GROUP_WORLD_SIZE", nodes)
    else:
        monkeypatch.delenv("GROUP_WORLD_SIZE")
    assert build(llava, **EXTERNAL_RANKS) == "none"
    (line,) = said
    assert "does not say that all ranks are on one node" in line
    assert '"none"' in line
    assert not program.runs


@pytest.mark.usefixtures("rank")
@pytest.mark.parametrize("folder", ["cannot be written", "is full"])
def test_ranks_without_a_file_to_share_are_refused(
    llava: Path, program: Program, tmp_path: Path, folder: str, monkeypatch: Any
) -> None:
    """Each would have budgets of its own, and read blocks that the others do not mean."""
    if folder == "is full":
        monkeypatch.setattr(profile_cache, "save_profile", no_space)
    else:
        for name in ("cache", f"tmp/sparsemm-{os.getuid()}"):
            (tmp_path / name).write_text("a file where the folder should be")
    with pytest.raises(ProfileError, match="all ranks of an external launcher need the same"):
        build(llava, **EXTERNAL_RANKS)
    assert len(program.runs) == (folder == "is full")


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


# A rank: it builds its configuration, as each process of an external launcher does.
RANK = """
import json, sys
from vllm.engine.arg_utils import EngineArgs
if __name__ == "__main__":
    arguments = EngineArgs(model=sys.argv[1], attention_backend="SPARSEMM", dtype="float32",
                           max_model_len=512, max_num_seqs=8, **json.loads(sys.argv[2]))
    settings = arguments.create_engine_config().additional_config["sparsemm"]
    print("profile", json.dumps(settings["profile"]["scores"]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.engine
def test_torchrun_with_the_real_profiler(tmp_path: Path, monkeypatch: Any) -> None:
    """Two ranks of one model, which would hold half of its heads each."""
    monkeypatch.setenv("SPARSEMM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rank.py").write_text(RANK)
    model = make_llava(tmp_path / "model")
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node=2"]
    address = ["--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    arguments = [tmp_path / "rank.py", model, json.dumps(EXTERNAL_RANKS)]
    done = subprocess.run(
        [str(word) for word in [*launcher, *address, *arguments]],
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    profiles = [line for line in done.stdout.splitlines() if line.startswith("profile ")]
    assert len(profiles) == 2
    assert len(set(profiles)) == 1
    assert len(list((tmp_path / "cache").glob("*.json"))) == 1
    assert "waiting for process" in done.stdout


def test_a_failure_is_an_error_with_its_last_lines(llava: Path, program: Program) -> None:
    program.write(fail=FAIL)
    with pytest.raises(ProfileError) as error:
        build(llava)
    message = str(error.value)
    assert "ended with code 3:\nno room for the model\n" in message
    assert '"none"' in message
    assert not list(environment.cache_folder().glob("*.json"))

    program.write()
    build(llava)
    assert len(program.runs) == 2, "the lock was released"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"load_format": "dummy"}, "weights are random"),
        ({"limit_mm_per_prompt": {"image": 0}}, "pictures are switched off"),
        ({"language_model_only": True}, "pictures are switched off"),
        ({"skip_tokenizer_init": True}, "no tokenizer"),
        ({"hf_overrides": lambda config: config}, "hf_overrides is a function"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_models_that_cannot_be_profiled_are_served_evenly_and_it_is_said(
    llava: Path, program: Program, said: list[str], options: dict[str, Any], reason: str
) -> None:
    assert build(llava, **options) == "none"
    (line,) = said
    assert "every head gets the same budget" in line
    assert reason in line
    assert not program.runs


def test_unknown_families_and_text_models(
    llava: Path, program: Program, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = engine_args(llava, "none").create_engine_config()
    monkeypatch.setattr(auto_profile, "FAMILIES", {"other": None})
    assert auto_profile.find_profile(config, engine_args(llava)) is None
    assert "the family 'llava'" in said[-1]
    assert "(known: other)" in said[-1]
    config.model_config.multimodal_config = None
    assert auto_profile.find_profile(config, engine_args(llava)) is None
    assert "it takes no pictures" in said[-1]
    assert not program.runs


def test_what_the_user_names_is_used_as_it_is(
    llava: Path, program: Program, tmp_path: Path, said: list[str]
) -> None:
    profile = skewed_profile().model_copy(update={"model_id": "mine"})
    save_profile(profile, tmp_path / "mine.json")
    assert build(llava, str(tmp_path / "mine.json"))["model_id"] == "mine"
    assert build(llava, profile.model_dump(mode="json"))["model_id"] == "mine"
    assert build(llava, "none") == "none"
    with pytest.raises(ProfileError, match="neither a file nor a bundled"):
        build(llava, "nowhere")
    assert not program.runs
    assert not said


@pytest.mark.parametrize("known_by", ["config_hash", "model_id"])
def test_bundled_profiles_come_first(
    llava: Path, program: Program, made: HeadProfile, known_by: str, monkeypatch: Any
) -> None:
    mine = {"config_hash": made.config_hash, "model_id": str(llava)}[known_by]
    bundled = skewed_profile().model_copy(
        update={"model_id": "bundled", known_by: mine, "provenance": {"from": "the package"}}
    )
    other = skewed_profile().model_copy(update={"config_hash": "0", "model_id": str(llava)})
    profiles = {"other": other, "right": bundled}
    monkeypatch.setattr(auto_profile, "bundled_profiles", lambda: list(profiles))
    monkeypatch.setattr(auto_profile, "load_bundled_profile", profiles.__getitem__)
    assert build(llava)["provenance"] == {"from": "the package"}
    assert not program.runs


def test_the_bundled_model_has_a_bundled_profile() -> None:
    folder = str(reader_folder())
    digest = config_hash(AutoConfig.from_pretrained(folder))
    assert auto_profile.bundled_profile(folder, digest) == "sparsemm-reader"


def test_the_profilers_own_engine_asks_for_no_profile(llava: Path, program: Program) -> None:
    """Or it would start another profiler, and that another."""
    options = {"dtype": "float32", "max_model_len": 256, "kv_cache_memory_bytes": 16 << 20}
    given: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.LLM", lambda **arguments: given.update(arguments))
        open_engine(str(llava), AutoConfig.from_pretrained(llava), 64, options)
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(**given).create_engine_config()
    assert config.additional_config["sparsemm"]["profile"] == "none"
    assert not program.runs


def test_a_cache_that_cannot_be_written_does_not_stop_the_server(
    llava: Path, program: Program, made: HeadProfile, said: list[str], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert build(llava) == made.model_dump(mode="json")
    assert any(f"{tmp_path}/cache cannot be written" in line for line in said)
    assert build(llava) == made.model_dump(mode="json")
    assert len(program.runs) == 1, "kept in the temporary folder"

    (tmp_path / "tmp" / f"sparsemm-{os.getuid()}").rename(tmp_path / "gone")
    (tmp_path / "tmp" / f"sparsemm-{os.getuid()}").symlink_to(tmp_path / "gone")
    assert build(llava) == made.model_dump(mode="json")
    assert len(program.runs) == 2, "another user's folder is not trusted"


def test_a_full_disk_does_not_stop_the_server(
    llava: Path, program: Program, made: HeadProfile, said: list[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(profile_cache, "save_profile", no_space)
    assert build(llava) == made.model_dump(mode="json")
    assert sum("No space left on device" in line for line in said) == 2


@pytest.mark.parametrize("damage", ["{", '{"schema_version": 99}', None])
def test_a_cached_profile_that_cannot_be_used_is_made_again(
    llava: Path, program: Program, made: HeadProfile, said: list[str], damage: str | None
) -> None:
    build(llava)
    (file,) = environment.cache_folder().glob("*.json")
    other = made.model_copy(update={"config_hash": "0" * 64}).model_dump_json()
    file.write_text(other if damage is None else damage)
    assert build(llava) == made.model_dump(mode="json")
    assert len(program.runs) == 2
    assert HeadProfile.model_validate_json(file.read_bytes()) == made
    assert any(str(file) in line and "not used" in line for line in said) == (damage is not None)


def test_a_model_has_one_name_online_and_offline() -> None:
    folder = "/home/me/.cache/huggingface/hub/models--org--name-7b/snapshots/abc123"
    assert auto_profile.model_id(folder) == "org/name-7b"
    assert auto_profile.model_id("org/name-7b") == "org/name-7b"
    assert auto_profile.model_id("/data/name-7b") == "/data/name-7b"


def test_another_config_has_another_profile(
    llava: Path, program: Program, made: HeadProfile
) -> None:
    first, second = (profile_cache.ProfileCache(str(llava), digest) for digest in ("a", "b"))
    assert first.file != second.file
    same_name = profile_cache.ProfileCache(f"/elsewhere/{llava.name}", "a")
    assert same_name.file != first.file
    assert profile_cache.ProfileCache("org/" + "x" * 300, "a").file.name.startswith("xxx")


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_the_program_and_its_engine_end_with_us(end: signal.Signals) -> None:
    code = (
        "import subprocess, sys, time\n"
        "engine = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(engine.pid, flush=True); time.sleep(60)"
    )
    seen: list[str] = []

    def stop(text: str) -> None:
        seen.append(text)
        os.kill(os.getpid(), end)
        time.sleep(5)  # until the handler raises

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if end == signal.SIGINT else SystemExit):
        run_profiler([sys.executable, "-c", code], show=stop)
    assert signal.getsignal(signal.SIGTERM) is before
    assert has_ended(int(seen[0]))


def test_a_program_that_leaves_something_behind_is_over(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it started may hold the pipe of its output for ever."""
    monkeypatch.setattr(auto_profile, "SAY_EVERY", 0.5)
    code = (
        "import subprocess, sys\n"
        "engine = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(engine.pid, flush=True); sys.exit(3)"
    )
    seen: list[str] = []
    began = time.monotonic()
    with pytest.raises(ProfileError, match="ended with code 3"):
        run_profiler([sys.executable, "-c", code], show=seen.append)
    assert time.monotonic() - began < 50, "it waited for what was left behind"
    assert has_ended(int("".join(seen)))


def has_ended(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"


def test_last_lines_are_what_a_terminal_would_show() -> None:
    text = "start\r\n\x1b[2K 10 %\r 90 %\x1b[0m\n\n" + "".join(f"line {i}\n" for i in range(19))
    lines = last_lines(text).split("\n")
    assert lines[0] == " 90 %"
    assert lines[-1] == "line 18"
    assert len(lines) == 20


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPARSEMM_CACHE", str(tmp_path))
    assert environment.cache_folder() == tmp_path
    monkeypatch.delenv("SPARSEMM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert environment.cache_folder() == tmp_path / "sparsemm"
