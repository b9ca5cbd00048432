"""One file per library of modules: which layers it has, and what its parameters are called.

Each has ``knows(module)`` and ``roles(module, inputs, kwargs)``, a role for each name; those
whose modules are pytrees of arrays also have ``roles_within(params)``.
"""
