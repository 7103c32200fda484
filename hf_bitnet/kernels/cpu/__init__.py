"""The C++ kernels for the CPU: `src/` is the library, `library.py` loads it, `bodies.py` calls it, `operators.py` compiles."""
