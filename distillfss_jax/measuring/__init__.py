"""What programs cost: timed, compared, and told in advance.

A `Bench` goes through a config's programs and times each; a `Roofline` goes
through the same and only looks at them. A suite is several configs, each in
its own process, and files of either are compared.
"""
