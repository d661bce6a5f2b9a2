"""What proves a kernel on a machine without a GPU. See docs/adding_a_kernel.md."""
