from __future__ import annotations

import pytest
import torch

from hildanext.errors import ConfigError
from hildanext.model.policy import check_build, choose_policy, is_out_of_memory, native_dtype


class Machine:
    """What torch says it runs on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.gpus()
        self.mps(False)
        self.cpu(avx512=False, amx=False)

    def gpus(self, *capabilities: tuple[int, int]) -> None:
        self.patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        self.patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index or 0])
        built = [f"sm_{major}{minor}" for major, minor in capabilities]
        self.patch.setattr(torch.cuda, "get_arch_list", lambda: built)

    def mps(self, present: bool) -> None:
        self.patch.setattr(torch.backends.mps, "is_available", lambda: present)

    def cpu(self, avx512: bool, amx: bool) -> None:
        self.patch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
        self.patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_gpus(machine: Machine, subtests: pytest.Subtests) -> None:
    for capability, dtype, mixed in [
        ((6, 1), torch.float16, "fp16"),
        ((7, 0), torch.float16, "fp16"),
        ((7, 5), torch.float16, "fp16"),
        ((8, 0), torch.bfloat16, "bf16"),
        ((8, 9), torch.bfloat16, "bf16"),
        ((9, 0), torch.bfloat16, "bf16"),
        ((10, 0), torch.bfloat16, "bf16"),
    ]:
        with subtests.test(capability=capability, dtype=dtype, mixed=mixed):
            machine.gpus(capability)
            policy = choose_policy()
            assert (policy.device.type, policy.compute, policy.mixed_precision) == ("cuda", dtype, mixed)
            assert policy.reason.startswith(f"sm_{capability[0]}{capability[1]} ")
            assert native_dtype("cuda", capability, cpu_bf16=True)[0] == dtype  # the CPU beside it has no say


def test_each_gpu_has_its_own_say(machine: Machine) -> None:
    machine.gpus((9, 0), (6, 1))
    assert choose_policy("cuda:0").compute == torch.bfloat16
    assert choose_policy("cuda:1").compute == torch.float16


def test_cpus(machine: Machine, subtests: pytest.Subtests) -> None:
    for avx512, amx, dtype in [
        (False, False, torch.float32),
        (True, False, torch.bfloat16),
        (False, True, torch.bfloat16),
    ]:
        with subtests.test(avx512=avx512, amx=amx, dtype=dtype):
            machine.cpu(avx512, amx)
            policy = choose_policy()
            assert (policy.device.type, policy.compute) == ("cpu", dtype)
            assert policy.mixed_precision == {torch.float32: "no", torch.bfloat16: "bf16"}[dtype]


def test_mps_computes_in_fp32_whatever_the_cpu_can(machine: Machine) -> None:
    machine.mps(True)
    machine.cpu(avx512=True, amx=True)
    assert choose_policy()[:2] == (torch.device("mps"), torch.float32)
    machine.gpus((8, 0))
    assert choose_policy().device.type == "cuda"
    assert choose_policy("cpu").device.type == "cpu"


def test_what_is_asked_for_and_possible_is_done(machine: Machine) -> None:
    for capability, dtype, compute in [
        ((6, 1), "float32", torch.float32),
        ((6, 1), "float16", torch.float16),
        ((9, 0), "float16", torch.float16),
        ((9, 0), "bfloat16", torch.bfloat16),
    ]:
        machine.gpus(capability)
        assert choose_policy("cuda", dtype)[1:3] == (compute, "asked for in the configuration"), (
            capability,
            dtype,
            compute,
        )


def test_bf16_may_be_asked_for_on_any_cpu() -> None:
    assert choose_policy("cpu", "bfloat16").compute == torch.bfloat16


def test_the_impossible_is_refused_by_key(machine: Machine, subtests: pytest.Subtests) -> None:
    for capabilities, asked, line in [
        ([], {"device": "cuda"}, r"'model.device': 'cuda' is not available"),
        ([], {"device": "mps"}, r"'model.device': 'mps' is not available"),
        ([], {"device": "gpu"}, r"'model.device': unknown device 'gpu'"),
        ([], {"device": ""}, r"'model.device': unknown device ''"),
        ([], {"device": "xpu"}, r"'model.device': 'xpu' is not available"),
        ([(8, 0)], {"device": "cuda:1"}, r"'model.device': 'cuda:1' is not available"),
        ([(6, 1)], {"dtype": "bfloat16"}, r"'model.dtype': bfloat16 is not native on sm_61; use 'float16' or 'auto'"),
        ([(7, 5)], {"dtype": "bfloat16"}, r"'model.dtype': bfloat16 is not native on sm_75"),
        ([], {"dtype": "float16"}, r"'model.dtype': float16 is for GPUs"),
    ]:
        with subtests.test(capabilities=capabilities, asked=asked, line=line):
            machine.gpus(*capabilities)
            with pytest.raises(ConfigError, match=line):
                choose_policy(**asked)


def test_kernels_follow_the_capability(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    for capability, dtype, scaler, flex in [
        ((6, 1), torch.float16, True, False),
        ((7, 0), torch.float16, True, False),
        ((7, 5), torch.float16, True, False),
        ((8, 0), torch.bfloat16, False, True),
        ((8, 9), torch.bfloat16, False, True),
        ((9, 0), torch.bfloat16, False, True),
    ]:
        for triton in [False, True]:
            with subtests.test(triton=triton, capability=capability, dtype=dtype, scaler=scaler, flex=flex):
                machine.gpus(capability)
                monkeypatch.setattr(
                    "importlib.util.find_spec", lambda name, triton=triton: object() if triton else None
                )
                policy = choose_policy()
                assert policy.compute == dtype
                assert (policy.mixed_precision == "fp16") == scaler
                assert policy.attention == ("flex" if flex and triton else "pieces")
                assert policy.compile == policy.as_dict()["compile"] == (flex and triton)  # nothing else is compiled
                assert policy.fused
                shown = policy.as_dict()
                assert (shown["loss_scaler"], shown["dtype"]) == (scaler, str(dtype).removeprefix("torch."))


@pytest.mark.parametrize("mps", [False, True])
def test_without_cuda_there_is_no_triton(machine: Machine, monkeypatch: pytest.MonkeyPatch, mps: bool) -> None:
    machine.mps(mps)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    policy = choose_policy()
    assert (policy.attention, policy.compile, policy.fused) == ("pieces", False, not mps)


def test_fp32_on_a_gpu_is_attended_in_pieces(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.gpus((9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert choose_policy("cuda", "float32").attention == "pieces"


def test_a_torch_without_kernels_for_the_card_is_said(subtests: pytest.Subtests) -> None:
    for capability, built, runs in [
        ((6, 1), ["sm_50", "sm_60", "sm_70"], True),  # a binary of the same major version
        ((6, 1), ["sm_75", "sm_80", "sm_90", "compute_90"], False),
        ((6, 1), ["sm_50", "compute_50"], True),  # PTX of an older version
        ((8, 9), ["sm_80", "sm_90a"], True),
        ((7, 0), ["sm_75", "compute_75"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90", "sm_120"], True),
    ]:
        with subtests.test(capability=capability, built=built, runs=runs):
            if runs:
                check_build(capability, built)
                continue
            with pytest.raises(
                ConfigError, match=rf"no kernels for sm_{capability[0]}{capability[1]}; install a build"
            ):
                check_build(capability, built)


def test_out_of_memory_is_told_from_other_errors() -> None:
    for error, expected in [
        (torch.OutOfMemoryError("CUDA: something new"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 1.16 GiB."), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError("can't allocate memory"), False),
    ]:
        assert is_out_of_memory(error) is expected, (error, expected)
