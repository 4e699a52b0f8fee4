"""Plain twins of what the library does with more care: ejected scripts get them in place of their originals.

Each has the name of its original behind `Plain` or `plain_`, gives the same numbers and writes files that the original reads; what
it leaves out is said in its docstring's stead by the table in docs/eject.md. Tests hold each to its original, value for value.
"""
