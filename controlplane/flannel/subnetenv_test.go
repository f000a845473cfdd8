package flannel

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// capturedEnvs returns the files that stock flannelds have written, by name.
func capturedEnvs(tb testing.TB) map[string][]byte {
	tb.Helper()
	paths, err := filepath.Glob("testdata/captured/subnet-*.env")
	if err != nil || len(paths) != 10 {
		tb.Fatalf("%d files, %v", len(paths), err)
	}
	files := map[string][]byte{}
	for _, path := range paths {
		files[filepath.Base(path)] = mustRead(tb, filepath.Join("captured", filepath.Base(path)))
	}
	return files
}

func TestCapturedSubnetEnvs(t *testing.T) {
	files := capturedEnvs(t)
	for name, want := range map[string]SubnetEnv{
		"subnet-etcd-n1.env": {Network: prefix("10.244.0.0/16"), Subnet: prefix("10.244.25.1/24"), MTU: 1450, IPMasq: true},
		"subnet-kube-dual-n2.env": {
			Network: prefix("10.244.0.0/16"), Subnet: prefix("10.244.1.1/24"),
			IPv6Network: prefix("fd00:10:244::/48"), IPv6Subnet: prefix("fd00:10:244:1::1/64"), MTU: 1450, IPMasq: true,
		},
		"subnet-kube-vni4096-n1.env": {Network: prefix("10.244.0.0/16"), Subnet: prefix("10.244.1.1/24"), MTU: 1350, IPMasq: true},
	} {
		if got, err := ParseSubnetEnv(files[name]); err != nil || got != want {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	for name, data := range files {
		e, err := ParseSubnetEnv(data)
		if back := e.Marshal(); err != nil || !bytes.Equal(back, data) {
			t.Errorf("%s came back as\n%s(%v)", name, back, err)
		}
	}
}

func TestSubnetEnvWithFaults(t *testing.T) {
	for text, want := range map[string]struct {
		env SubnetEnv
		err string
	}{
		"":                             {},
		"OTHER=x\n":                    {},
		"FLANNEL_NETWORK=10.9.0.1/16":  {env: SubnetEnv{Network: prefix("10.9.0.0/16")}},
		"FLANNEL_SUBNET=10.9.1.1/24\r": {env: SubnetEnv{Subnet: prefix("10.9.1.1/24")}},
		"FLANNEL_NETWORK=10.8.0.0/16,10.9.0.0/16\nFLANNEL_MTU=1450": {
			SubnetEnv{MTU: 1450}, `FLANNEL_NETWORK="10.8.0.0/16,10.9.0.0/16" is not one IPv4 prefix`,
		},
		"FLANNEL_SUBNET=fd00::1/64\nFLANNEL_IPV6_SUBNET=10.9.1.1/24\nFLANNEL_MTU=-50\nFLANNEL_IPMASQ=yes\nhello\nFLANNEL_IPV6_NETWORK=fd00::/48": {
			SubnetEnv{IPv6Network: prefix("fd00::/48")}, `line 5: "hello": not of the form NAME=value
FLANNEL_SUBNET="fd00::1/64" is not one IPv4 prefix
FLANNEL_IPV6_SUBNET="10.9.1.1/24" is not one IPv6 prefix
FLANNEL_MTU="-50" is no MTU; give bytes from 0 to 65535
FLANNEL_IPMASQ="yes"; give true or false`,
		},
	} {
		got, err := ParseSubnetEnv([]byte(text))
		if got != want.env || (err == nil) != (want.err == "") || (err != nil && err.Error() != want.err) {
			t.Errorf("%q: %+v\n%v\nwant %+v\n%s", text, got, err, want.env, want.err)
		}
	}
}

func TestEnvFiles(t *testing.T) {
	for line, want := range map[string]string{
		`A=`:                   ``,
		`A=b`:                  `b`,
		`  A=b  `:              `b`,
		"A=b\r":                `b`,
		`export A=b`:           `b`,
		`A=b # c`:              `b`,
		`A=b#c`:                `b#c`,
		`A="b c"`:              `b c`,
		`A='b c'`:              `b c`,
		`A=b'c d'"e"f`:         `bc def`,
		`A=b\ c`:               `b c`,
		`A="b\"c\\d\e\$f"`:     `b"c\d\e$f`,
		`A='b\c$d` + "`" + `'`: `b\c$d` + "`",
		`A="x;y|z"`:            `x;y|z`,
		`A=10.1.74.1/24`:       `10.1.74.1/24`,
		`A=--mtu=1450`:         `--mtu=1450`,
		"A=b\nA=c":             `c`,
	} {
		got, err := ParseEnvFile([]byte("# a comment\n\n" + line + "\n"))
		if err != nil || len(got) != 1 || got["A"] != want {
			t.Errorf("%s: %q, %v", line, got, err)
		}
	}
}

// What a shell would run or expand is neither run nor taken as it stands.
func TestEnvFileThatWantsAShell(t *testing.T) {
	for line, want := range map[string]error{
		`A=$(touch /tmp/x)`: errNotPlain,
		"A=`touch /tmp/x`":  errNotPlain,
		`A="$B"`:            errNotPlain,
		`A=b;touch /tmp/x`:  errNotPlain,
		`A=b&`:              errNotPlain,
		`A=b|c`:             errNotPlain,
		`A=b>c`:             errNotPlain,
		`A=(b c)`:           errNotPlain,
		`A=~`:               errNotPlain,
		`export A={b,c}`:    errNotPlain,
		"A=b\x00c":          errNotPlain,
		"A=\"b\x1b[2J\"":    errNotPlain,
		`A=b c`:             errMoreWords,
		`A=b C=d`:           errMoreWords,
		`A="b`:              errQuote,
		`A='b`:              errQuote,
		`A=b\`:              errQuote,
		`A b`:               errNoAssignment,
		`A =b`:              errNoAssignment,
		`1A=b`:              errNoAssignment,
		`=b`:                errNoAssignment,
		`touch /tmp/x`:      errNoAssignment,
		`A+=b`:              errNoAssignment,
	} {
		got, err := ParseEnvFile([]byte("B=b\n" + line + "\nC=c\n"))
		if err == nil || !strings.HasSuffix(err.Error(), want.Error()) || !strings.HasPrefix(err.Error(), "line 2: ") {
			t.Errorf("%s: %v, want %v", line, err, want)
		}
		if len(got) != 2 || got["B"] != "b" || got["C"] != "c" {
			t.Errorf("%s: the other lines became %q", line, got)
		}
	}
	if _, err := ParseEnvFile(bytes.Repeat([]byte("#"), maxEnvFile+1)); err == nil {
		t.Error("a file that is too large is read")
	}
}

func TestSubnetEnvIsWrittenAtOnce(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	dir := filepath.Join(t.TempDir(), "run", "flannel")
	path := filepath.Join(dir, "subnet.env")
	e := SubnetEnv{Network: prefix("10.244.0.0/16"), Subnet: prefix("10.244.25.1/24"), MTU: 1450}
	if err := WriteFile(path, e); err != nil {
		t.Fatal(err)
	}
	before, err := os.Open(path) // somebody who reads slowly
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	changed := e
	changed.MTU = 1400
	if err := WriteFile(path, changed); err != nil {
		t.Fatal(err)
	}
	old := make([]byte, 1024)
	n, err := before.Read(old)
	if err != nil || !bytes.Equal(old[:n], e.Marshal()) {
		t.Errorf("who had the old file open reads\n%s(%v)", old[:n], err)
	}
	if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, changed.Marshal()) {
		t.Errorf("the file holds\n%s(%v)", now, err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v is left, %v", left, err)
	}
}

func TestSubnetEnvThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "subnet.env")
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := WriteFile(path, SubnetEnv{}); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("over a directory: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%v is left, %v", left, err)
	}
	if err := WriteFile("/dev/null/subnet.env", SubnetEnv{}); err == nil {
		t.Error("below a file")
	}
}

func FuzzSubnetEnv(f *testing.F) {
	for _, data := range capturedEnvs(f) {
		f.Add(data)
	}
	for _, w := range mustCases[writtenCase](f, "written.json") {
		f.Add([]byte(w.SubnetEnv))
	}
	f.Add([]byte("export A=\"b\\\"c\" # d\nFLANNEL_SUBNET='10.1.2.3/24'\r\nFLANNEL_MTU=$(id)\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := ParseSubnetEnv(data)
		if e.MTU < 0 || e.Network != e.Network.Masked() {
			t.Fatalf("%+v", e)
		}
		if err != nil {
			return
		}
		if e.Network.IsValid() != e.Subnet.IsValid() || e.IPv6Network.IsValid() != e.IPv6Subnet.IsValid() {
			return // half a family is not written
		}
		if back, err := ParseSubnetEnv(e.Marshal()); err != nil || back != e {
			t.Fatalf("%+v came back as %+v (%v)", e, back, err)
		}
	})
}
