"""Every kernel with integer arguments equal to 1, which Triton turns into constants; needs no GPU.

    python -m benchmarks.kernels.ones [--ops OP ...]

A constant has no `.to`, so a kernel that compiles at 37 tokens may fail at one. Each integer argument that the launch
specialises is set to 1 alone, then all of them together. Only Triton's front end runs, because such a kernel fails
there, in a hundredth of the time of a full compilation. Exits 1 if a kernel fails.
"""

import argparse
import sys
from collections.abc import Iterator

from ft_dist_kernels.aot import AotCase

from benchmarks.kernels.resources import TARGETS, ops


def ones(case: AotCase) -> Iterator[tuple[str, ...]]:
    """The sets of arguments to try."""
    kept = {parameter.name for parameter in getattr(case.kernel, "params", ()) if parameter.do_not_specialize}
    integers = [name for name, kind in case.signature.items() if kind in ("i32", "i64") and name not in kept]
    yield from ((name,) for name in integers)
    if len(integers) > 1:
        yield tuple(integers)


def lower(case: AotCase, equal: tuple[str, ...]) -> None:
    """Builds the kernel's IR. Raises what Triton raises."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    signature = case.signature | dict.fromkeys(equal, "constexpr")
    names = list(signature)
    values = case.constexprs | dict.fromkeys(equal, 1)
    source = ASTSource(case.kernel, signature, {(names.index(name),): value for name, value in values.items()})
    target = GPUTarget(*TARGETS["sm_90"])
    backend = make_backend(target)
    options = backend.parse_options(dict(case.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.ones", description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="*", help="only these ops")
    chosen = parser.parse_args(arguments).ops
    tried, failed = 0, 0
    for op, cases in ops().items():
        seen = set()
        for case in cases("sm_90") if not chosen or op in chosen else ():
            # a kernel's flags select its branches, its sizes do not
            flags = (case.kernel, *(v for v in case.constexprs.values() if isinstance(v, bool | str | None)))
            flags += (case.constexprs.get("N"),)
            if flags in seen:
                continue
            seen.add(flags)
            for equal in ones(case):
                tried += 1
                try:
                    lower(case, equal)
                except Exception as error:
                    failed += 1
                    reason = str(error).strip().splitlines()[-1]
                    print(f"{op}: {case.name} with {' = '.join(equal)} = 1: {type(error).__name__}: {reason}")
    print(f"{tried} kernels with arguments equal to 1: {failed} do not compile")
    return 1 if failed or not tried else 0


if __name__ == "__main__":
    sys.exit(main())
