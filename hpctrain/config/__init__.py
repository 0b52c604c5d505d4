"""A TOML file to frozen dataclasses, with every mistake explained. Needs neither torch nor MPI."""
