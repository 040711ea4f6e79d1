"""`modeling/` installs as `hf_arch.modeling`; the packages are found, so that a new architecture needs no line here."""

from setuptools import find_packages, setup

setup(
    package_dir={"hf_arch": "hf_arch", "hf_arch.modeling": "modeling"},
    packages=[
        *find_packages(include=["hf_arch", "hf_arch.*"]),
        "hf_arch.modeling",
        *("hf_arch.modeling." + name for name in find_packages("modeling")),
    ],
)
