"""What a service is confined by, and what it tries against that: texts for `service_checks.py`."""

from __future__ import annotations

from tests.support.machine import PROGRAM, trees

SANDBOX = f"""
[Service]
Type=oneshot
DynamicUser=yes
StateDirectory=sandbox
LoadCredential=file:/etc/machine-id
ProtectSystem=strict
ProtectHome=tmpfs
PrivateTmp=yes
PrivateUsers=yes
PrivateMounts=yes
ProtectProc=invisible
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectClock=yes
DevicePolicy=closed
KeyringMode=private
OOMScoreAdjust=-200
LimitNOFILE=65536
LimitMEMLOCK=infinity
ProtectControlGroups=yes
ProtectHostname=yes
RestrictNamespaces=yes
NoNewPrivileges=yes
CapabilityBoundingSet=
SystemCallFilter=@system-service
{"".join(f"BindReadOnlyPaths={tree}{chr(10)}" for tree in trees())}
ExecStart={PROGRAM}/bin/python -c 'import llama_smart_proxy.proxy.config'
"""
"""Whether services can be confined in a machine at all, and read what the tests run."""
PROBES = {
    "write /usr": "open('/usr/x', 'w')",
    "write /etc": "open('/etc/x', 'w')",
    "write /boot": "open('/boot/x', 'w')",
    "write /opt": "open('/opt/x', 'w')",
    "read /etc/shadow": "open('/etc/shadow').read()",
    "read /home": "os.listdir('/home/user')",
    "read a credential's source": "open('/etc/llama-smart-proxy/credentials/SECRET').read()",
    "read a credential": "open(os.environ['CREDENTIALS_DIRECTORY'] + '/credentials_SECRET').read()",
    "make a user namespace": "call('unshare', 0x10000000)",
    "mount": "call('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "trace a process": "call('ptrace', 16, os.getppid(), 0, 0)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "write its state": "open(os.environ['HOME'] + '/x', 'w')",
    "write its models": "open(os.environ['HF_HOME'] + '/hub/x', 'w')",
    "read a model": "open('/srv/fakes/fake.gguf').read()",
}
PROBE = f"""
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(name, *args):
    if getattr(libc, name)(*args) != 0:
        raise OSError(ctypes.get_errno(), name)
found = {{}}
for name, code in {PROBES!r}.items():
    try:
        exec(code)
    except OSError as exc:
        found[name] = "denied"
    else:
        found[name] = "allowed"
open(os.environ["HOME"] + "/probed", "w").write(json.dumps(found))
"""
"""A program that writes down which of `PROBES` it is denied."""
