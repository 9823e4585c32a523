"""Compiles CUDA C while the program runs, by NVIDIA's NVRTC, and launches its kernels.

NVRTC comes with torch's CUDA packages. It needs neither a C compiler nor the CUDA toolkit, unlike Triton and
`torch.utils.cpp_extension`. NVRTC and the driver are called by their C interfaces, which are stable.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from sam3_runner.inference.device_errors import is_out_of_memory

Argument = ctypes.c_void_p | ctypes.c_int


class KernelsUnavailable(Exception):
    """NVRTC or the driver is missing, or refused the source; the message has the reason."""


class Kernels:
    """The kernels of one source file on one GPU.

    Args:
        source_file: CUDA C without includes; its kernels are `extern "C"`.
        names: of the kernels.
        device: a CUDA device.

    Raises:
        KernelsUnavailable: the source cannot be compiled or loaded here.
    """

    def __init__(self, source_file: Path, names: tuple[str, ...], device: torch.device) -> None:
        self._device = device
        self._driver = _library("libcuda.so.1")
        self._module = ctypes.c_void_p()  # Never unloaded: the kernels are used until the process ends.
        major, minor = torch.cuda.get_device_capability(device)
        binary = compile_cuda(source_file, f"sm_{major}{minor}")
        try:
            with torch.cuda.device(device):
                torch.cuda.synchronize()  # Creates the context, which the driver's calls need.
                self._check(self._driver.cuModuleLoadData(ctypes.byref(self._module), binary))
                self._functions = {name: self._function(name) for name in names}
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise KernelsUnavailable(f"{source_file.name} cannot be loaded: {error}") from error

    def launch(self, name: str, grid: tuple[int, int], threads: int, *arguments: Argument) -> None:
        """Start a kernel on torch's current stream; does not wait for it.

        Args:
            name: of the kernel.
            grid: blocks.
            threads: of a block.
            arguments: the kernel's, of exactly its types.

        Raises:
            RuntimeError: the driver refused, or an earlier kernel failed; as torch's own errors.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        with torch.cuda.device(self._device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            self._check(
                self._driver.cuLaunchKernel(
                    self._functions[name], *grid, 1, threads, 1, 1, 0, stream, addresses, None
                )
            )

    def _function(self, name: str) -> ctypes.c_void_p:
        function = ctypes.c_void_p()
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), self._module, name.encode()))
        return function

    def _check(self, status: int) -> None:
        if status:
            message = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(message))
            raise RuntimeError(f"CUDA error: {(message.value or b'unknown').decode()}")


def compile_cuda(source_file: Path, architecture: str) -> bytes:
    """The machine code of `source_file` for `architecture`, for instance sm_90. Needs no GPU.

    Raises:
        KernelsUnavailable: NVRTC is missing, does not know the architecture, or refuses the source.
    """
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    source = source_file.read_bytes()
    created = nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source, source_file.name.encode(), 0, None, None
    )
    if created:
        raise KernelsUnavailable(f"NVRTC cannot begin to compile {source_file.name}: error {created}")
    try:
        options = (ctypes.c_char_p * 1)(f"--gpu-architecture={architecture}".encode())
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            log = _output(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            reason = log.rstrip(b"\0\n").decode(errors="replace")
            raise KernelsUnavailable(f"NVRTC cannot compile {source_file.name} for {architecture}: {reason}")
        return _output(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(
    size_of: ctypes._NamedFuncPointer, read: ctypes._NamedFuncPointer, program: ctypes.c_void_p
) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    output = ctypes.create_string_buffer(size.value)
    read(program, output)
    return output.raw


def _nvrtc() -> ctypes.CDLL:
    """The library of torch's CUDA version: the process's, the system's, or that of NVIDIA's packages."""
    if not torch.version.cuda:
        raise KernelsUnavailable("this torch has no CUDA")
    name = f"libnvrtc.so.{torch.version.cuda.partition('.')[0]}"
    try:
        return _library(name)
    except KernelsUnavailable:
        packages = Path(torch.__file__).parent.parent / "nvidia"
        found = sorted(packages.glob(f"*/lib/{name}"))
        if not found:
            raise
        return _library(str(found[0]))


def _library(name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        raise KernelsUnavailable(str(error)) from error
