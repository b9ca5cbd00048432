"""One file per library of modules: its layers, and the names of its parameters.

Each has ``knows(module)`` and ``roles(module, inputs, kwargs)``, a role for each name; those
whose modules are pytrees of arrays also have ``roles_within(params)``.
"""
