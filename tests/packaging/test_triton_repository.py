"""A model repository for Triton, whose own client asks for what is in it.

No Triton runs here. The client asks a server that speaks its protocol, takes what our
config.pbtxt allows, and computes with ONNX Runtime what a version's directory holds.
"""

import importlib.util
import json
import shutil
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.manifest import EngineEntry
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.pipeline.package import package
from propulsion_export.pipeline.run import predict

SAMPLE = Path(__file__).parents[2] / "samples" / "triton_client.py"


def with_weights_aside(artifact, output):
    """A copy of an export whose weights lie in a file of their own, as larger ones do."""
    shutil.copytree(artifact, output)
    model = ir.load(output / "model.onnx")
    ir.save(model, output / "model.onnx", external_data="model.onnx.data", size_threshold_bytes=256)
    Artifact.write(output, Artifact.read(artifact).manifest)
    return output


@pytest.fixture(scope="session")
def repository(banked, tmp_path_factory):
    """The bank as a repository with the model `topics`."""
    root = tmp_path_factory.mktemp("triton")
    source = with_weights_aside(banked, root / "bank")
    package(source, root / "models", layout="triton", model_name="topics")
    shutil.rmtree(source)  # a package needs it no more
    return root / "models"


def told_adapters(model):
    return json.loads((model / "adapters.json").read_text())


def test_a_repository_holds_what_triton_reads_and_nothing_it_complains_of(repository):
    model = repository / "topics"

    assert {path.name for path in repository.iterdir() if path.is_dir()} == {"topics"}
    # Triton warns of each directory that is no version.
    assert [path.name for path in model.iterdir() if path.is_dir()] == ["1"]
    assert {path.name for path in (model / "1").iterdir()} == {
        *("model.onnx", "model.onnx.data", "propulsion_bank.bin")
    }
    assert {path.name for path in model.iterdir()} >= {
        *("config.pbtxt", "adapters.json", "config.json", "tokenizer.json")
    }
    assert not any(path.is_symlink() for path in repository.rglob("*"))


def test_a_mixed_batch_of_the_packaged_graph_is_the_banks_bit_for_bit(repository, banked, tmp_path):
    alone = shutil.copytree(repository / "topics" / "1", tmp_path / "alone")
    names = ["five", "base", "three", "five", "three", "base"]
    known, bank = told_adapters(repository / "topics"), Artifact.read(banked)
    rows, values = bank.open_bank().choose(names)
    session, original = (
        onnxruntime.InferenceSession(directory / "model.onnx") for directory in (alone, banked)
    )
    tokens = np.random.default_rng(0).integers(5, 99, (len(names), 7))
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    feeds["token_type_ids"] = np.zeros_like(tokens)

    def run(ids, **more):
        (found,) = session.run(["logits"], feeds | {"adapter_ids": np.array(ids)})
        return found

    found = run([known[name]["id"] for name in names])
    numbers = np.array([row.number for row in rows])
    fed = {"adapter_ids": numbers, "propulsion_bank": np.ascontiguousarray(values)}

    np.testing.assert_array_equal(found, original.run(["logits"], feeds | fed)[0], strict=True)
    swapped = run([known[name]["id"] for name in reversed(names)])
    assert not np.array_equal(found[:3], swapped[:3])


def test_the_configuration_tells_of_the_graphs_own_inputs_and_outputs(repository):
    text = (repository / "topics" / "config.pbtxt").read_text()
    config = text_format.Parse(text, ModelConfig())
    session = onnxruntime.InferenceSession(repository / "topics" / "1" / "model.onnx")

    assert config.name == "topics"
    for told, found in (
        (config.input, session.get_inputs()),
        (config.output, session.get_outputs()),
    ):
        assert [tensor.name for tensor in told] == [value.name for value in found]
        for tensor, value in zip(told, found, strict=True):
            dims = [] if tensor.HasField("reshape") else list(tensor.dims)
            sizes = [-1 if isinstance(size, str) else size for size in value.shape]
            assert [-1, *dims] == sizes
            kind = {"tensor(int64)": "TYPE_INT64", "tensor(float)": "TYPE_FP32"}[value.type]
            assert DataType.Name(tensor.data_type) == kind


def test_adapters_are_told_with_their_labels_and_those_removed_stay_behind(banked, world, tmp_path):
    directory = shutil.copytree(banked, tmp_path / "bank")
    remove_adapter(directory, "three")
    add_adapter(directory, f"again={world.three}")

    made = package(directory, tmp_path / "models", layout="triton", model_name="m")

    known = told_adapters(tmp_path / "models" / "m")
    assert made.adapters == ("again", "five")
    assert {name: entry["id"] for name, entry in known.items()} == {
        "base": 0,
        "five": 1,
        "again": 2,
    }
    assert known["again"]["labels"] == ["three-0", "three-1", "three-2"]
    assert known["again"]["digest"] == Artifact.read(directory).list_adapters()["again"].digest
    written = (tmp_path / "models" / "m" / "1" / "propulsion_bank.bin").stat().st_size
    snapshot = Artifact.read(directory).open_bank().snapshot()
    # The base model, two adapters, and the row of ids that nobody has.
    assert written == 4 * snapshot.values[0].nbytes


def test_a_folded_export_is_served_as_it_is(folded, tmp_path):
    folded = with_weights_aside(folded, tmp_path / "folded")

    made = package(folded, tmp_path / "models", layout="triton")

    assert made.model_name == "models"
    model = tmp_path / "models" / "models"
    for name in ("model.onnx", "model.onnx.data"):
        assert (model / "1" / name).read_bytes() == (folded / name).read_bytes()
    config = text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
    assert "adapter_ids" not in {tensor.name for tensor in config.input}
    assert told_adapters(model)["three"]["id"] is None


def test_an_engine_with_its_bank_inside_keeps_the_numbers_it_was_built_with(banked, tmp_path):
    directory = shutil.copytree(banked, tmp_path / "bank")
    artifact = Artifact.read(directory)
    engine = tmp_path / "engine"
    as_engine(artifact, engine)
    remove_adapter(directory, "three")  # too late for the engine

    package(engine, tmp_path / "models", layout="triton", model_name="m", max_batch_size=4)

    model = tmp_path / "models" / "m"
    assert (model / "1" / "model.plan").read_bytes() == b"engine"
    assert [path.name for path in (model / "1").iterdir()] == ["model.plan"]
    numbers = {name: row.number for name, row in artifact.open_bank().rows().items()}
    assert {name: entry["id"] for name, entry in told_adapters(model).items()} == {
        "base": 0,
        **numbers,
    } | {"three": Artifact.read(engine).open_bank().rows()["three"].number}
    config = text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
    assert (config.backend, config.max_batch_size) == ("tensorrt", 4)


def as_engine(artifact, directory):
    """What an artifact would be if TensorRT had built it with its bank inside."""
    manifest = artifact.manifest
    inputs = tuple(spec for spec in manifest.inputs if spec.name != "propulsion_bank")
    profile = {
        spec.name: {level: [rows, *[8] * len(spec.shape[1:])] for level, rows in LEVELS.items()}
        for spec in inputs
    }
    options = {"bank": "constant"}
    entry = EngineEntry("tensorrt", "10.16", ("sm_89",), (profile,), options, "sha256:00")
    directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copyfile(artifact.directory / name, directory / name)
    shutil.copytree(artifact.directory / "adapters", directory / "adapters")
    (directory / "model.engine").write_bytes(b"engine")
    Artifact.write(directory, replace(manifest, kind="engine", engine=entry, inputs=inputs))


LEVELS = {"min": 1, "opt": 8, "max": 16}


def test_a_repository_is_replaced_by_force_alone_and_by_no_other_command(banked, folded, tmp_path):
    output = tmp_path / "models"
    package(folded, output, layout="triton", model_name="old")

    with pytest.raises(UsageError, match="exists and is not empty"):
        package(banked, output, layout="triton", model_name="new")
    assert (output / "old" / "config.pbtxt").is_file()
    package(banked, output, layout="triton", model_name="new", force=True)

    assert {path.name for path in output.iterdir()} == {"new", "propulsion.json"}
    with pytest.raises(ArtifactError, match="is a package for Triton, expected an artifact"):
        predict(output, text=["ba"])


@pytest.mark.parametrize("output", ["bank", "."])
def test_the_bank_is_not_written_over_even_by_force(output, banked, tmp_path):
    directory = shutil.copytree(banked, tmp_path / "bank")
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}

    with pytest.raises(UsageError, match="an input of this command"):
        package(directory, tmp_path / output, layout="triton", force=True)
    assert before == {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}


def test_nothing_is_left_of_a_repository_that_fails_on_the_way(banked, tmp_path):
    directory = shutil.copytree(banked, tmp_path / "bank")
    bank = Artifact.read(directory).open_bank()
    with bank.find_file().open("r+b") as file:
        file.seek(bank.rows()["five"].number * bank.values()[0].nbytes)
        file.write(b"\xff\xff")

    with pytest.raises(ArtifactError, match=r"row \d is sha256:\w+, expected"):
        package(directory, tmp_path / "models", layout="triton")
    assert [path.name for path in tmp_path.iterdir()] == ["bank"]


# Triton's client against a server that takes what the configuration allows


class Server(ThreadingHTTPServer):
    """Of KServe's protocol what the sample uses: a model's metadata, and inference in binary."""

    def __init__(self, model):
        super().__init__(("127.0.0.1", 0), Handler)
        self.name = model.name
        self.session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
        self.config = text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
        self.requests = []

    def metadata(self):
        def told(tensors):
            return [
                {
                    "name": tensor.name,
                    "datatype": DataType.Name(tensor.data_type).removeprefix("TYPE_"),
                    "shape": [-1, *tensor.dims],
                }
                for tensor in tensors
            ]

        inputs, outputs = told(self.config.input), told(self.config.output)
        return {"name": self.name, "versions": ["1"], "inputs": inputs, "outputs": outputs}

    def infer(self, feeds):
        """Check as Triton does what config.pbtxt says, reshape, and run."""
        self.requests.append(feeds)
        tensors = {tensor.name: tensor for tensor in self.config.input}
        assert feeds.keys() == tensors.keys()
        rows = {len(values) for values in feeds.values()}
        assert len(rows) == 1
        assert max(rows) <= self.config.max_batch_size
        for name, values in feeds.items():
            wanted = tensors[name]
            assert f"TYPE_{np_to_triton_dtype(values.dtype)}" == DataType.Name(wanted.data_type)
            assert len(values.shape) == 1 + len(wanted.dims)
            for size, dim in zip(values.shape[1:], wanted.dims, strict=True):
                assert dim in (-1, size)
            if wanted.HasField("reshape"):
                feeds[name] = values.reshape(len(values), *wanted.reshape.shape)
        names = [tensor.name for tensor in self.config.output]
        return dict(zip(names, self.session.run(names, feeds), strict=True))


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    LENGTH = "Inference-Header-Content-Length"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        assert self.path == f"/v2/models/{self.server.name}"
        self.answer(json.dumps(self.server.metadata()).encode())

    def do_POST(self):
        assert self.path == f"/v2/models/{self.server.name}/infer"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        length = int(self.headers[self.LENGTH])
        asked, rest, feeds = json.loads(body[:length]), body[length:], {}
        for tensor in asked["inputs"]:
            size = tensor["parameters"]["binary_data_size"]
            values = np.frombuffer(rest[:size], triton_to_np_dtype(tensor["datatype"]))
            feeds[tensor["name"]], rest = values.reshape(tensor["shape"]), rest[size:]
        assert rest == b""
        outputs = self.server.infer(feeds)
        told = [
            {
                "name": name,
                "datatype": np_to_triton_dtype(values.dtype),
                "shape": list(values.shape),
                "parameters": {"binary_data_size": values.nbytes},
            }
            for name, values in outputs.items()
        ]
        header = json.dumps({"model_name": self.server.name, "outputs": told}).encode()
        self.answer(header, *(values.tobytes() for values in outputs.values()))

    def answer(self, header, *tensors):
        body = b"".join((header, *tensors))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header(self.LENGTH, str(len(header)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def serve():
    """`serve(model)`: a running server of a model's directory."""
    servers = []

    def start(model):
        servers.append(Server(model))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def sample():
    specification = importlib.util.spec_from_file_location("triton_client", SAMPLE)
    sample = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(sample)
    return sample


@pytest.fixture
def client(sample, serve, repository, monkeypatch, capsys):
    """`client("three=a text", …)`: what the sample prints, and the server it asked."""

    def ask(*texts, model=None):
        model = model or repository / "topics"
        server = serve(model)
        url = f"127.0.0.1:{server.server_port}"
        monkeypatch.setattr("sys.argv", ["triton_client.py", str(model), *texts, "--url", url])
        sample.main()
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        return SimpleNamespace(lines=lines, server=server)

    return ask


TEXTS = ("ba be bi", "bo", "be ba bu bi bo ba", "bu bu")


def test_the_sample_client_prints_what_run_predicts_of_the_bank(client, banked):
    names = ["three", "five", "five", "three"]

    asked = client(*(f"{name}={text}" for name, text in zip(names, TEXTS, strict=True)))

    expected = predict(banked, text=TEXTS, adapter=names)
    assert asked.lines == [[one["text"], one["adapter"], one["label"]] for one in expected]
    # The twin: with the adapters swapped, labels would be other ones.
    assert {line[2].partition("-")[0] for line in asked.lines} == {"three", "five"}
    (request,) = asked.server.requests
    assert request["adapter_ids"].tolist() == [1, 2, 2, 1]


def test_the_sample_pads_requests_to_few_lengths_so_that_they_meet_in_a_batch(client):
    lengths = {client(f"five={text}").server.requests[0]["input_ids"].shape[1] for text in TEXTS}

    assert lengths <= {8, 16}


def test_the_sample_sends_no_ids_where_the_adapter_is_folded(client, folded, tmp_path):
    package(folded, tmp_path / "models", layout="triton")

    asked = client(*(f"three={text}" for text in TEXTS), model=tmp_path / "models" / "models")

    expected = predict(folded, text=TEXTS)
    assert [line[2] for line in asked.lines] == [one["label"] for one in expected]
    assert "adapter_ids" not in asked.server.requests[0]


def test_the_sample_asks_no_server_for_an_adapter_that_there_is_not(client):
    with pytest.raises(SystemExit, match="has no adapter 'other', only base, three, five"):
        client("other=ba")


@pytest.mark.parametrize(
    ("texts", "adapters"),
    [([], []), ([], ["three"]), (["ba", "be"], ["three"]), (["ba"], ["three", "five"])],
)
def test_the_sample_wants_an_adapter_for_each_text(texts, adapters, sample, repository):
    found = f"{len(texts)} texts and {len(adapters)} adapters, expected an adapter for each text"

    with pytest.raises(SystemExit, match=found):
        sample.predict(None, repository / "topics", texts, adapters)
