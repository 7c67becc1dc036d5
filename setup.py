"""`package_dir` maps the packages that live outside `ft_dist/`.

`kernels/` must not itself become the package `kernels`: Hugging Face's loader on PyPI has that name, and transformers
imports it. `configs/` and `launch/` hold data; they are installed inside `ft_dist`, so that recipes are usable by name.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["ft_dist", "ft_dist.*"]),
        *find_packages("kernels"),
        "ft_dist.configs",
        "ft_dist.launch",
    ],
    package_dir={
        "ft_dist": "ft_dist",
        "ft_dist_kernels": "kernels/ft_dist_kernels",
        "ft_dist.configs": "configs",
        "ft_dist.launch": "launch",
    },
    package_data={
        "ft_dist.configs": ["*.yaml", "emails/*.jsonl"],
        "ft_dist.launch": ["*.j2", "profiles/*.yaml"],
        "ft_dist": ["py.typed"],
        "": ["*.yaml"],
    },
)
