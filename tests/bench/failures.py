"""A plugin of pytest, `-p bench.failures`: a test that fails is written to the file $FAILURES at
once, as a line of JSON: [name, traceback]."""

import json
import os


class Failures:
    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(os.environ["FAILURES"], "a") as f:
                f.write(json.dumps([report.nodeid, report.longreprtext]) + "\n")

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # the processes of pytest-xdist report to this one
        config.pluginmanager.register(Failures())
