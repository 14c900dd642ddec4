"""The commands: a module here defines ``COMMAND``, a :class:`~kappa_lightning.cli.command.Command`, and is found by it.

What takes long to import, such as Lightning or Matplotlib, is imported inside ``run``, since ``--help`` imports all.
"""
