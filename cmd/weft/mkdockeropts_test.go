package main

import (
	"encoding/json"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/test/netns"
)

// scriptCase is a call of mk-docker-opts.sh, and what came of it.
type scriptCase struct {
	Name        string
	Args        []string
	File        *string // what is in subnet.env, if there is one
	Environment map[string]string
	Route       string // is led to another host
	Before      string // what is in the other file
	Status      int
	Output      *string // what is in it afterwards, if it is there
}

// mustScriptCases reads what the script has said to each call.
func mustScriptCases(tb testing.TB) []scriptCase {
	tb.Helper()
	data, err := os.ReadFile("testdata/mk-docker-opts.json")
	if err != nil {
		tb.Fatal(err)
	}
	var cases []scriptCase
	if err := json.Unmarshal(data, &cases); err != nil {
		tb.Fatal(err)
	}
	return cases
}

// scriptDifferences are the cases in which we refuse what the script has a
// shell make of it, and leave the file as it was. The other cases that begin
// with "shell:" are below.
var scriptDifferences = map[string]string{
	"end of options":                      `weft: mk-docker-opts: there is no use for "-c"; "weft mk-docker-opts -h" shows how to call it`,
	"an argument":                         `weft: mk-docker-opts: there is no use for "extra"; "weft mk-docker-opts -h" shows how to call it`,
	"shell: a command":                    `weft: DIR/subnet.env: line 5: "FLANNEL_MTU=$(echo 1300)": only plain values are read; nothing is run or expanded`,
	"shell: a variable":                   `weft: DIR/subnet.env: line 6: "FLANNEL_MTU=$A": only plain values are read; nothing is run or expanded`,
	"shell: two assignments":              `weft: DIR/subnet.env: line 1: "FLANNEL_SUBNET=10.1.74.1/24 FLANNEL_MTU=1472": one assignment a line; put a value with spaces in quotes`,
	"shell: a line that is no assignment": `weft: DIR/subnet.env: line 5: "hello-there-nobody": not of the form NAME=value`,
	"shell: quotes in a value":            `weft: DOCKER_OPT_MTU is "--mtu=14\"72"; quotes, backslashes, $ and control characters can't be in an option`,
	"shell: a key that is none":           `weft: mk-docker-opts: -k is "A-B"; give the name of a variable, without DOCKER_OPT_ in it`,
	"shell: a key that is an option":      `weft: mk-docker-opts: -k is "DOCKER_OPT_ALL"; give the name of a variable, without DOCKER_OPT_ in it`,
}

// flannelOpts is what comes of the file in most cases.
const flannelOpts = `DOCKER_OPT_IPMASQ="--ip-masq=true"
DOCKER_OPT_MTU="--mtu=1472"
`

// scriptMended are the cases in which the script writes nonsense, and what we
// write.
var scriptMended = map[string]string{
	// It also writes a line bar'="".
	"shell: an option with spaces": `DOCKER_OPT_BIP="--bip=10.1.74.1/24"
DOCKER_OPT_FOO="--foo bar"
` + flannelOpts + `DOCKER_OPTS=" --bip=10.1.74.1/24 --foo bar --ip-masq=true --mtu=1472"
`,
	// It takes any variable for an option that mentions one.
	"shell: a value that names an option": `DOCKER_OPT_BIP="--bip=10.1.74.1/24"
` + flannelOpts + `DOCKER_OPTS=" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"
`,
	// It finds false\r invalid.
	"shell: carriage returns": `DOCKER_OPT_BIP="--bip=10.1.74.1/24"
` + flannelOpts + `DOCKER_OPTS=" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"
`,
	// -h is no mistake here.
	"usage": "old\n",
}

// TestDockerOptsAsTheScriptMakesThem calls the command as flannel's
// mk-docker-opts.sh was called, in a namespace with the same routes.
func TestDockerOptsAsTheScriptMakesThem(t *testing.T) {
	ns := netns.New(t)
	ns.MustDo(t, hostWithNeighbour)
	for _, test := range mustScriptCases(t) {
		t.Run(test.Name, func(t *testing.T) {
			dir := t.TempDir()
			file, output := filepath.Join(dir, "subnet.env"), filepath.Join(dir, "docker_opts.env")
			if test.File != nil {
				mustWriteFile(t, file, *test.File)
			}
			if test.Before != "" {
				mustWriteFile(t, output, test.Before)
			}
			for name, value := range test.Environment {
				t.Setenv(name, value)
			}
			var status int
			var stderr string
			ns.MustDo(t, func() error {
				defer route(t, test.Route)()
				status, _, stderr = newDesk(t).call(append([]string{"mk-docker-opts", "-f", file, "-d", output}, test.Args...)...)
				return nil
			})

			refusal, refused := scriptDifferences[test.Name]
			mended, isMended := scriptMended[test.Name]
			want := test.Output
			switch {
			case isMended:
				want, test.Status = &mended, 0
			case refused:
				want, test.Status = nil, 1
				if got := strings.TrimSpace(strings.ReplaceAll(stderr, dir, "DIR")); got != refusal {
					t.Errorf("told %s\nwant %s", got, refusal)
				}
			}
			if (status == 0) != (test.Status == 0) || (status == 0) != (stderr == "") {
				t.Errorf("status %d, the script's is %d\n%s", status, test.Status, stderr)
			}
			if got := readIfThere(t, output); (got == nil) != (want == nil) || (got != nil && *got != *want) {
				t.Errorf("got\n%s, want\n%s", shown(got), shown(want))
			}
		})
	}
	for _, name := range slices.Concat(slices.Collect(maps.Keys(scriptDifferences)), slices.Collect(maps.Keys(scriptMended))) {
		if !slices.ContainsFunc(mustScriptCases(t), func(c scriptCase) bool { return c.Name == name }) {
			t.Errorf("there is no case %q", name)
		}
	}
}

func mustWriteFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// readIfThere returns a file's content, or nil when there is none.
func readIfThere(t *testing.T, path string) *string {
	t.Helper()
	data, err := os.ReadFile(path)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	return &text
}

func shown(text *string) string {
	if text == nil {
		return "no file"
	}
	return *text
}

// hostWithNeighbour makes a network of 192.0.2.0/24.
func hostWithNeighbour() error {
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "v0"}, PeerName: "v1"}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	address, err := netlink.ParseAddr("192.0.2.1/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(pair, address); err != nil {
		return err
	}
	other, err := netlink.LinkByName("v1")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(other); err != nil {
		return err
	}
	return netlink.LinkSetUp(pair)
}

// route leads a prefix to the neighbour, until what it returns is called.
func route(t *testing.T, prefix string) func() {
	t.Helper()
	if prefix == "" {
		return func() {}
	}
	_, dst, err := net.ParseCIDR(prefix)
	if err != nil {
		t.Fatal(err)
	}
	r := &netlink.Route{Dst: dst, Gw: net.ParseIP("192.0.2.2")}
	if err := netlink.RouteAdd(r); err != nil {
		t.Fatal(err)
	}
	return func() { netlink.RouteDel(r) }
}

func TestDockerOptsThatLeadElsewhere(t *testing.T) {
	ns := netns.New(t)
	dir := t.TempDir()
	file, output := filepath.Join(dir, "subnet.env"), filepath.Join(dir, "docker_opts.env")
	mustWriteFile(t, file, "FLANNEL_SUBNET=10.1.74.1/24\n")
	ns.MustDo(t, func() error {
		if err := hostWithNeighbour(); err != nil {
			return err
		}
		defer route(t, "10.1.74.0/24")()
		status, stdout, stderr := newDesk(t).call("mk-docker-opts", "-f", file, "-d", output)
		want := "weft: the routing table leads 10.1.74.0/24 to 192.0.2.2 already, so it can't be dockerd's; is it another node's? If not, remove the route (ip route del 10.1.74.0/24)\n"
		if status != 1 || stdout != "" || stderr != want {
			t.Errorf("status %d, %s%s", status, stdout, stderr)
		}
		return nil
	})
}

// The bridge's own route, once dockerd runs, is in nobody's way.
func TestDockerOptsThatLeadToTheBridge(t *testing.T) {
	ns := netns.New(t)
	ns.MustDo(t, func() error {
		if err := hostWithNeighbour(); err != nil {
			return err
		}
		if err := checkNotRouted("192.0.2.1/24"); err != nil {
			t.Error(err)
		}
		return nil
	})
}

func TestDockerOptsOfTheEnvironment(t *testing.T) {
	o := dockerOptions{FlannelEnv: "/nonexistent", Key: "DOCKER_OPTS"}
	for _, test := range []struct {
		environ []string
		text    string // "" for a refusal
	}{
		{[]string{"DOCKER_OPT_A=--a   b\t", "DOCKER_OPT_B=x=y"}, "DOCKER_OPT_A=\"--a b\"\nDOCKER_OPT_B=\"x=y\"\nDOCKER_OPTS=\" --a b x=y\"\n"},
		{[]string{"DOCKER_OPT_A.B=no variable", "1DOCKER_OPT_=1", "DOCKER_OPT_"}, "DOCKER_OPTS=\"\"\n"},
		{[]string{`DOCKER_OPTS=--label "x y"`}, ""},
		{[]string{"DOCKER_OPTS=--a\nB=--b"}, ""},
		{[]string{"DOCKER_OPT_A=$(touch x)"}, ""},
		{[]string{"DOCKER_OPT_A=\\"}, ""},
	} {
		values, err := o.read(test.environ)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := o.format(values); text != test.text || (err == nil) != (test.text != "") {
			t.Errorf("%q: %s, %v", test.environ, text, err)
		}
	}
}

func TestDockerOptsThatCannotBeWritten(t *testing.T) {
	dir := t.TempDir()
	status, _, stderr := newDesk(t).call("mk-docker-opts", "-f", "/nonexistent", "-d", filepath.Join(dir, "no", "where"))
	if status != 1 || !strings.HasPrefix(stderr, "weft: writing dockerd's options: open "+dir) {
		t.Errorf("status %d, %s", status, stderr)
	}
	status, _, stderr = newDesk(t).call("mk-docker-opts", "-k", "", "-f", "", "-d", "")
	want := `weft: mk-docker-opts:
  -k is ""; give the name of a variable, without DOCKER_OPT_ in it
  -f is empty; give the path of a file
  -d is empty; give the path of a file
`
	if status != 2 || stderr != want {
		t.Errorf("status %d, %s", status, stderr)
	}
}

// A link, and a device, are written through.
func TestDockerOptsAreWrittenInPlace(t *testing.T) {
	dir := t.TempDir()
	target, link := filepath.Join(dir, "target"), filepath.Join(dir, "link")
	mustWriteFile(t, target, "old\n")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	newDesk(t).must("mk-docker-opts", "-f", "/nonexistent", "-d", link)
	if got := readIfThere(t, target); *got != "DOCKER_OPTS=\"\"\n" {
		t.Errorf("the link's target holds %s", *got)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v", info.Mode(), err)
	}
}

func TestClustersOfOptions(t *testing.T) {
	for args, want := range map[string]string{
		"":                "",
		"-ic":             "-i -c",
		"-ickNAME":        "-i -c -k NAME",
		"-kNAME -mi":      "-k NAME -m -i",
		"-k -i -c":        "-k -i -c",
		"-d /a/b -ic":     "-d /a/b -i -c",
		"-k":              "-k",
		"-iz":             "-i -z",
		"-i -- -ic":       "-i -- -ic",
		"-i extra -ic":    "-i extra -ic",
		"-h -ic":          "-h -i -c",
		"--help -ic":      "--help -i -c",
		"- -ic":           "- -ic",
		"-f/run/x -d/y/z": "-f /run/x -d /y/z",
	} {
		if got := strings.Join(splitCluster(strings.Fields(args)), " "); got != want {
			t.Errorf("%s: %s, want %s", args, got, want)
		}
	}
}

func FuzzDockerOpts(f *testing.F) {
	for _, c := range mustScriptCases(f) {
		if c.File != nil {
			f.Add(*c.File, c.Environment["DOCKER_OPT_FOO"])
		}
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, file, own string) {
		o := dockerOptions{FlannelEnv: filepath.Join(dir, "subnet.env"), DockerEnv: "/dev/null", Key: "DOCKER_OPTS"}
		mustWriteFile(t, o.FlannelEnv, file)
		values, err := o.read([]string{"DOCKER_OPT_FOO=" + own})
		if err != nil {
			return
		}
		text, err := o.format(values)
		if err != nil {
			return
		}
		// What is written is assignments, one a line, and means what was meant.
		for line := range strings.Lines(text) {
			name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), `="`)
			value, quoted := strings.CutSuffix(value, `"`)
			if !ok || !quoted || !variableName.MatchString(name) || strings.ContainsAny(value, "\"$`\\\n\x00") {
				t.Fatalf("%q in\n%s", line, text)
			}
		}
	})
}
