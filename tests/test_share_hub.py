"""What is pushed to a hub, here a server on this machine, is what is saved."""

import base64
import http.server
import json
import threading
from functools import partial

import pytest
import yaml
from saved import images, reloaded, small

from sansmax.models.share import ModelCard, push_to_hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as an upload asks for; `asked` are the requests, `files` what was committed."""

    def __init__(self, state, *arguments):
        self.state = state
        super().__init__(*arguments)

    def log_message(self, *arguments):
        pass

    def reply(self, status, body=None, **headers):
        data = json.dumps(body or {}).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state["asked"].append((self.command, self.path))
        address = f"http://{self.headers['Host']}/me/net"
        if self.headers.get("Authorization") != "Bearer right":
            self.reply(401, {"error": "Invalid credentials"})
        elif self.path == "/api/repos/create":
            self.state["created"] = json.loads(body)
            self.reply(200, {"url": address})
        elif self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            self.reply(200, {"errors": [], "warnings": []})
        elif "/branch/" in self.path:
            self.reply(200)
        elif "/preupload/" in self.path:
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.reply(200, {"files": [{"path": f["path"], **modes} for f in json.loads(body)["files"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.state["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply(200, {"commitUrl": f"{address}/commit/abc", "commitOid": "abc"})
        elif "/resolve/" in self.path and self.path.rpartition("/")[2] in self.state["files"]:
            self.reply(200, X_Repo_Commit="abc", ETag='"abc"')
        else:
            self.reply(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")

    do_GET = do_POST = do_HEAD = do_PUT = handle_request


@pytest.fixture
def hub():
    """A hub on this machine: its state, and its address under "endpoint"."""
    pytest.importorskip("huggingface_hub")
    state = {"asked": [], "files": {}}
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, state))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield {**state, "state": state, "endpoint": f"http://127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()
    thread.join()


def test_what_is_pushed_is_what_is_saved(hub, tmp_path, assert_same):
    model = small()
    address = push_to_hub(model, "me/net", labels=["a", "b", "c"], token="right", endpoint=hub["endpoint"])
    assert address == f"{hub['endpoint']}/me/net/commit/abc"
    assert hub["state"]["created"]["name"] == "net"
    assert hub["state"]["created"]["visibility"] == "public"
    for name, content in hub["files"].items():
        (tmp_path / name).write_bytes(content)
    assert sorted(hub["files"]) == ["README.md", "config.json", "model.safetensors"]
    x = images(tmp_path)
    assert_same(reloaded(tmp_path)(x), model(x))
    assert 'timm.create_model("hf-hub:me/net", pretrained=True)' in (tmp_path / "README.md").read_text()
    assert 'model="me/net"' in (tmp_path / "README.md").read_text()


def test_a_card_on_the_hub_is_kept_unless_another_is_given(hub):
    hub["files"]["README.md"] = b"mine"
    options = {"token": "right", "endpoint": hub["endpoint"]}
    push_to_hub(small(), "me/net", **options)
    assert hub["files"]["README.md"] == b"mine" and "config.json" in hub["files"]
    push_to_hub(small(), "me/net", card=ModelCard(title="New"), **options)
    assert b"# New\n" in hub["files"]["README.md"]


def test_a_branch_is_made_and_a_private_repository_asked_for(hub):
    push_to_hub(small(), "me/net", private=True, revision="next", token="right", endpoint=hub["endpoint"])
    assert hub["state"]["created"]["visibility"] == "private"
    assert ("POST", "/api/models/me/net/branch/next") in hub["asked"]
    assert ("POST", "/api/models/me/net/commit/next") in hub["asked"]


def test_the_hub_says_no_and_what_to_do(hub):
    options = {"endpoint": hub["endpoint"], "check": False}
    with pytest.raises(ValueError, match=r"does not let you write to me/net \(401\); log in once with `hf auth login`"):
        push_to_hub(small(), "me/net", token="wrong", **options)
    with pytest.raises(ValueError, match=r"no name of a repository.*Give OWNER/NAME"):
        push_to_hub(small(), "me/a net", token="right", **options)
    assert not hub["files"]


def test_no_network_is_explained():
    with pytest.raises(ValueError, match=r"could not be reached .*save_pretrained"):
        push_to_hub(small(), "me/net", token="x", endpoint="http://127.0.0.1:9", check=False)


def test_what_cannot_be_saved_is_not_pushed(hub):
    model = small(attention="relu")
    model.blocks[0].attn = small(attention="squared_relu").blocks[0].attn
    with pytest.raises(ValueError, match="gives other outputs"):
        push_to_hub(model, "me/net", token="right", endpoint=hub["endpoint"])
    assert hub["asked"] == []
