"""Measure a step: its time, its memory, its arithmetic, and what this machine could do at best."""
import random
import statistics
import time

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

GIB = 2 ** 30


def machine(device):
    """Return the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device}, {torch.get_num_threads()} thread(s)"


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(call, device):
    """Return the seconds of one call, to the end of its work on the device."""
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def alternate(contenders, repeats, device):
    """Return {name: median seconds} of functions that take turns, after an untimed call of each."""
    # in turns, so that whatever else the machine does hits all of them alike, and each time in
    # another order; the first call allocates and chooses kernels, and does not count
    times = {name: [] for name in contenders}
    order = list(contenders)
    shuffle = random.Random(0).shuffle
    for _ in range(repeats + 1):
        for name in order:
            times[name].append(seconds_of(contenders[name], device))
        shuffle(order)
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def peak_bytes(call, device):
    """Return the most memory that a call holds above what stood before it.

    Of a training step this is the step's own: activations, gradients and temporary tensors, but not
    weights, average and moments, which stand before and after it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    # the raw events: the public list leaves out what an operation allocates within itself
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = 0
    peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---- arithmetic and traffic

def kind(name):
    """Return what an operation of torch is, by its name: "attention", "matrix" or "elementwise"."""
    # torch.compile names a fused kernel after all that it is near, a template after what it does
    if name.startswith("triton_") and not name.startswith("triton_tem"):
        return "elementwise"
    if "attention" in name:
        return "attention"
    products = ("mm", "matmul", "convolution", "conv2d", "linear", "gemm")
    if any(word in name for word in products):
        return "matrix"
    return "elementwise"


class Traffic(TorchDispatchMode):
    """Add up the bytes that all other operations read and write: sums, norms, copies."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and kind(func.name()) == "elementwise":
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return out


def arithmetic(call):
    """Return the floating-point operations of a call: {"matrix": ..., "attention": ...}."""
    with FlopCounterMode(display=False) as counter:
        call()
    flops = {"matrix": 0, "attention": 0}
    for operation, count in counter.get_flop_counts().get("Global", {}).items():
        flops[kind(str(operation))] += count
    return flops


def traffic(call):
    """Return the bytes that a call moves outside of matrix products and attention."""
    with Traffic() as counter:
        call()
    return counter.bytes


# ---- what the machine can do

def matrix_rate(device, autocast, side=None, repeats=5):
    """Return the floating-point operations a second of a large matrix product."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a = torch.randn(side, side, device=device)
    with autocast:
        dtype = F.linear(a[:1, :1], a[:1, :1]).dtype                        # autocast's
    a = a.to(dtype)
    return 2 * side ** 3 / alternate({"": lambda: a @ a}, repeats, device)[""]


def copy_rate(device, size=2 ** 28, repeats=5):
    """Return the bytes a second that a large copy reads and writes."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    return 2 * size / alternate({"": lambda: a.copy_(b)}, repeats, device)[""]


def time_by_kind(call, device):
    """Return {kind of operation: seconds} of one call, by torch.profiler; "other" is the rest."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    whole = seconds_of(call, device)
    with profile(activities=activities) as found:
        profiled = seconds_of(call, device)
    if device.type != "cuda":                                               # there, profiling makes the device wait
        whole = profiled
    seconds = {"matrix": 0, "attention": 0, "elementwise": 0}
    for event in found.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue                                                        # a kernel: its operation has its time, too
        own = event.self_cpu_time_total
        if device.type == "cuda":
            own = event.self_device_time_total
        seconds[kind(event.key)] += own / 1e6
    seconds["other"] = max(0.0, whole - sum(seconds.values()))
    return seconds
