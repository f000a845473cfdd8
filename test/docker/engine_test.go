//go:build linux && peers

package docker_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// dockerSocket is where a node's dockerd listens, as the node sees it.
const dockerSocket = "unix:///run/docker.sock"

// dockerdScript starts dockerd with the options that mk-docker-opts has written, as
// a unit with EnvironmentFile= does. All that it keeps is in the node's own /run;
// what it would write to /etc/docker of the machine goes nowhere.
//
// It may not be told to lower its oom score, which takes a capability that a root
// in a container lacks.
const dockerdScript = `set -e
mount -t tmpfs weftlab /etc/docker
. /run/docker_opts.env
exec dockerd $DOCKER_OPTS --host ` + dockerSocket + ` \
	--data-root /run/docker-data --storage-driver overlay2 \
	--exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "$0" --oom-score-adjust 0`

// engine is a dockerd in a node.
type engine struct {
	*lab.Node
	process *lab.Process
	cgroup  string
}

// startDocker starts dockerd on a node that has its subnet, and returns when it has
// an image to run. It ends with the test, and so do its containers: it is the first
// process of a namespace of processes.
func startDocker(tb testing.TB, n *lab.Node) *engine {
	tb.Helper()
	t := lab.T(tb)
	t.Run(n, weft, "mk-docker-opts", "-d", "/run/docker_opts.env")
	e := &engine{Node: n, cgroup: "/weft-" + n.Namespace()}
	e.process = t.Start(n, "unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", dockerdScript, e.cgroup)
	tb.Cleanup(func() { e.stop(tb) })
	t.Eventually(30*time.Second, func() error {
		if !e.process.Running() {
			tb.Fatalf("%s: dockerd has ended:\n%s", n, e.process.Output())
		}
		_, err := e.docker(tb.Context(), "version")
		return err
	})
	load := e.Command(tb.Context(), "docker", "--host", dockerSocket, "import", "-", image)
	load.Stdin = bytes.NewReader(rootFS(tb))
	if out, err := load.CombinedOutput(); err != nil {
		tb.Fatalf("%s: docker import: %v\n%s", n, err, out)
	}
	return e
}

// docker runs a command of the docker client.
func (e *engine) docker(ctx context.Context, args ...string) (string, error) {
	return e.Output(ctx, append([]string{"docker", "--host", dockerSocket}, args...)...)
}

// stop ends the containers and dockerd, and takes away the control groups that
// they have left.
func (e *engine) stop(tb testing.TB) {
	if tb.Failed() {
		lines := strings.Split(e.process.Output(), "\n")
		tb.Logf("dockerd of %s:\n%s", e, strings.Join(lines[max(0, len(lines)-20):], "\n"))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	containers, err := e.docker(ctx, "ps", "-aq")
	if all := strings.Fields(containers); err == nil && len(all) > 0 {
		_, err = e.docker(ctx, append([]string{"rm", "-f"}, all...)...)
	}
	if err := errors.Join(err, e.process.Stop(syscall.SIGKILL), removeGroups(e.cgroup)); err != nil {
		tb.Errorf("%s: ending dockerd: %v", e, err)
	}
}

// removeGroups removes a control group from each hierarchy that it is in.
func removeGroups(group string) error {
	var errs []error
	for _, pattern := range []string{"/sys/fs/cgroup" + group, "/sys/fs/cgroup/*" + group} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return err
		}
		for _, dir := range found {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// image is the name of what containers run: busybox and a page to serve.
const (
	image = "weft.test/busybox"
	page  = "hello from a container"
)

// rootFS is the image's file system.
func rootFS(tb testing.TB) []byte {
	tb.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		tb.Fatal(err)
	}
	program, err := os.ReadFile(path)
	if err != nil {
		tb.Fatal(err)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h *tar.Header, content []byte) {
		h.Size = int64(len(content))
		if err := w.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			tb.Fatal(err)
		}
	}
	add(&tar.Header{Name: "bin/busybox", Mode: 0o755}, program)
	for _, name := range strings.Fields("sh sleep usleep seq cat ping arping traceroute nc httpd") {
		add(&tar.Header{Name: "bin/" + name, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil)
	}
	add(&tar.Header{Name: "www/index.html", Mode: 0o644}, []byte(page))
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// container is one that runs until the test ends.
type container struct {
	engine *engine
	name   string
	ip     string
}

// run starts a container with options of docker run.
func (e *engine) run(tb testing.TB, name string, options []string, command ...string) *container {
	tb.Helper()
	args := append([]string{"run", "--detach", "--name", name}, options...)
	if _, err := e.docker(tb.Context(), append(append(args, image), command...)...); err != nil {
		tb.Fatal(err)
	}
	ip, err := e.docker(tb.Context(), "inspect", "--format", "{{.NetworkSettings.IPAddress}}", name)
	if err != nil {
		tb.Fatal(err)
	}
	return &container{engine: e, name: name, ip: strings.TrimSpace(ip)}
}

// String names the container and its node.
func (c *container) String() string { return fmt.Sprintf("%s/%s", c.engine, c.name) }

// Output runs a command in the container and returns what it printed.
func (c *container) Output(ctx context.Context, command ...string) (string, error) {
	return c.engine.docker(ctx, append([]string{"exec", c.name}, command...)...)
}

// Start is Output in the background.
func (c *container) Start(command ...string) (*lab.Process, error) {
	return c.engine.Start(append([]string{"docker", "--host", dockerSocket, "exec", c.name}, command...)...)
}
