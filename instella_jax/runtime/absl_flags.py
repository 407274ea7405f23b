"""The flags of libraries, in programs that do not parse any."""


def allow_unparsed_flags() -> None:
    """Let libraries read their absl flags, such as ArrayRecord and grain, in any program."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
