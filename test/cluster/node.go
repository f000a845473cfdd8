//go:build linux

package cluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/weft-net/weft/test/lab"
)

// Node is a machine of the cluster.
type Node struct {
	*lab.Node
	cluster *Cluster
	process *lab.Process
}

// nodeScript runs a node's programs. Its first lines say what its arguments are.
//
//go:embed node.sh
var nodeScript string

// start starts containerd, the kubelet and kube-proxy, as the first processes of a
// namespace of processes, and imports the images.
func (n *Node) start(ctx context.Context) (err error) {
	if err := n.Run(ctx, "ip link delete cni0"); err != nil { // the plugin makes it
		return err
	}
	// A container that is not privileged has these read-only, and runc mounts nothing
	// over /proc: here it is the node's operator who sets them.
	for _, name := range []string{"nf_conntrack_tcp_be_liberal", "nf_conntrack_tcp_ignore_invalid_rst"} {
		if err := n.Sysctl("net/netfilter/"+name, "1"); err != nil {
			return err
		}
	}
	// For the same reason: weft turns router advertisements off on flannel.1.
	if err := n.Sysctl("net/ipv6/conf/default/accept_ra", "0"); err != nil {
		return err
	}
	if err := makeGroups(n.group()); err != nil {
		return err
	}
	c := n.cluster
	// Its /run is its own: what it shall have of ours has to be put there.
	for _, file := range []string{kubeconfigFile, "pod.tar", "weft.tar"} {
		content, err := os.ReadFile(c.file(file))
		if err != nil {
			return err
		}
		if err := os.WriteFile(n.Path("/run/"+file), content, 0o600); err != nil {
			return err
		}
	}
	n.process, err = n.Start("unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", nodeScript,
		n.group(), "/run/"+kubeconfigFile, n.IP.String(), c.programs["kubelet"], c.programs["kube-proxy"], c.Options.ProxyMode, podNetwork, PodImage, n.String())
	if err != nil {
		return err
	}
	if err := n.eventually(ctx, 30*time.Second, func() error { return n.ctr(ctx, "version") }); err != nil {
		return err
	}
	for _, image := range []string{"pod.tar", "weft.tar"} {
		if err := n.ctr(ctx, "images", "import", "/run/"+image); err != nil {
			return err
		}
	}
	return n.Run(ctx, "touch", "/run/images-are-here")
}

// ctr runs containerd's own client.
func (n *Node) ctr(ctx context.Context, args ...string) error {
	return n.Run(ctx, append([]string{"ctr", "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io"}, args...)...)
}

// eventually tries until something works, as long as the node's programs run.
func (n *Node) eventually(ctx context.Context, within time.Duration, try func() error) error {
	for deadline := time.Now().Add(within); ; time.Sleep(100 * time.Millisecond) {
		err := try()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || !n.process.Running() || ctx.Err() != nil {
			return fmt.Errorf("node %s: %w\n%s", n, err, n.process.Output())
		}
	}
}

// writeCNIConfig writes what flannel's CNI plugin delegates to, when the node has
// its subnet.
func (n *Node) writeCNIConfig(ctx context.Context) error {
	var subnet string
	err := n.eventually(ctx, 60*time.Second, func() (err error) {
		subnet, err = n.cluster.Kubectl(ctx, "get", "node", n.String(), "-o", "jsonpath={.spec.podCIDR}")
		if err == nil && subnet == "" {
			err = errors.New("the controller has not given it a subnet")
		}
		return err
	})
	if err != nil {
		return err
	}
	return os.WriteFile(n.Path("/run/cni/net.d/10-weft.conflist"), fmt.Appendf(nil, cniConfig, subnet, podNetwork), 0o644)
}

const cniConfig = `{"cniVersion": "1.0.0", "name": "cbr0", "plugins": [
  {"type": "bridge", "bridge": "cni0", "mtu": 1450, "hairpinMode": true, "isGateway": true, "isDefaultGateway": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": %q}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
`

// stop ends the node's programs and takes away the control groups that they leave.
func (n *Node) stop() error {
	if n.process == nil {
		return nil
	}
	return errors.Join(n.process.Stop(syscall.SIGKILL), removeGroups(n.group()))
}

// group is the node's control group in every hierarchy.
func (n *Node) group() string { return "weft-" + n.Namespace() }

// groupRoot is where control groups of version 1 have their hierarchies.
const groupRoot = "/sys/fs/cgroup"

// makeGroups makes a control group below every hierarchy. One of cpuset has to be
// given its CPUs and memory before it can have processes (cpuset(7)).
func makeGroups(group string) error {
	if _, err := os.Stat(groupRoot + "/cgroup.controllers"); err == nil {
		return os.Mkdir(filepath.Join(groupRoot, group), 0o755) // version 2 alone
	}
	hierarchies, err := filepath.Glob(groupRoot + "/*/cgroup.procs")
	if err != nil {
		return err
	}
	for _, hierarchy := range hierarchies {
		dir := filepath.Dir(hierarchy)
		if err := os.Mkdir(filepath.Join(dir, group), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			content, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				continue // another hierarchy
			}
			if err := os.WriteFile(filepath.Join(dir, group, file), content, 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// removeGroups removes a control group and those below it from every hierarchy. What
// was in them has just been killed, and may take a moment to go.
func removeGroups(group string) (err error) {
	for range 50 {
		if err = tryRemoveGroups(group); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func tryRemoveGroups(group string) error {
	var errs []error
	for _, pattern := range []string{groupRoot + "/" + group, groupRoot + "/*/" + group} {
		found, err := filepath.Glob(pattern)
		errs = append(errs, err)
		for _, top := range found {
			var dirs []string
			err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return err
			})
			errs = append(errs, err)
			for i := len(dirs) - 1; i >= 0; i-- {
				if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// Log is the end of what the node's programs have printed.
func (n *Node) Log() string {
	lines := strings.Split(n.process.Output(), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}
