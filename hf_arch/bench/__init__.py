"""Speed, memory and state of the architectures and of who else does the same job: `hf-arch bench`."""
