import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastvar.engines.aotinductor import native
from fastvar.engines.aotinductor.operators import ATTENTION, LINEAR, LINEAR_INT8, WINOGRAD, register
from fastvar.errors import BuildError


def test_without_a_compiler_nothing_is_made(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_compiler", lambda: ["no-such-compiler"])
    with pytest.raises(BuildError, match=r"(?s)no-such-compiler.*install a C\+\+ compiler"):
        native.build(tmp_path)
    assert not any(tmp_path.iterdir())


def test_another_source_is_another_digest(monkeypatch, tmp_path):
    before = native.kernel_digest()
    for name in (*native.SOURCES, *native.HEADERS):
        (tmp_path / name).write_bytes((native.KERNELS / name).read_bytes())
    monkeypatch.setattr(native, "KERNELS", tmp_path)
    assert native.kernel_digest() == before
    (tmp_path / "linear.cpp").write_text("// changed")
    assert native.kernel_digest() != before


FRESH_PROCESS = """
import sys, torch
*tensors, expected = torch.load(sys.argv[2])
got = torch._inductor.aoti_load_package(sys.argv[1])(*tensors)
assert torch.equal(got, expected)
assert not hasattr(torch.ops.fastvar, "attention")
assert "fastvar" not in sys.modules
"""


class Layers(torch.nn.Module):
    """Every operator of ours, each on part of a larger tensor too."""

    def forward(
        self, q: Tensor, keys: Tensor, bias: Tensor, values: Tensor, scale: Tensor, weight: Tensor, kernel: Tensor
    ) -> Tensor:
        ops = torch.ops.fastvar
        own = ops.attention(q, keys[:, :2], keys[:, :2], None, False)
        x = ops.attention(own, keys[:7, 2:], keys[:7, 2:], bias, True).flatten(1)  # [5, 64]
        halves = ((x[:, :32], False), (x[:, 32:], True))
        quantised = [ops.linear_int8(part, values, scale, scale, gelu) for part, gelu in halves]
        image = own.unsqueeze(0)  # [1, 5, 2, 32]
        convolved = ops.winograd(image, kernel, None, image, True, True, False)[0].flatten(1)
        parts = (ops.linear(x, weight, scale, True), *quantised, convolved)
        return torch.cat(parts, dim=1)  # no sum, which would round elsewhere


@pytest.mark.slow
def test_a_compiled_program_holds_our_code(tmp_path):
    """It needs no file of ours beside it, and no Python of ours in the process."""
    if lacking := native.cpu_lacks((*native.AVX512_BF16, *native.AVX512_VNNI)):
        pytest.skip(f"this CPU lacks {', '.join(lacking)}")
    operators = {register(operator): operator.declaration for operator in (ATTENTION, LINEAR_INT8, LINEAR, WINOGRAD)}
    folder = tmp_path / "a folder"  # its name reaches the linker
    q, keys, scale, weight = (torch.randn(shape).bfloat16() for shape in ((5, 2, 32), (9, 4, 32), (48,), (48, 64)))
    bias = torch.where(torch.arange(7) < 5, 0.0, -1e30).expand(2, 1, -1).contiguous()
    kernel = torch.randn(32, 32, 3, 3).bfloat16()
    tensors = (q, keys, bias, torch.randint(-127, 128, (32, 48), dtype=torch.int8), scale, weight, kernel)
    program = torch.export.export(Layers(), tensors)
    quick = {
        "compile_threads": 1,
        "aot_inductor.precompile_headers": False,
        "aot_inductor.compile_wrapper_opt_level": "O0",
    }
    options = native.inductor_options(operators, folder) | quick
    package, data = tmp_path / "program.pt2", tmp_path / "tensors.pt"
    torch._inductor.aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
    torch.save((*tensors, Layers()(*tensors)), data)
    folder.rename(tmp_path / "gone")
    command = [sys.executable, "-c", FRESH_PROCESS, str(package), str(data)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
