//go:build linux

package cluster

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
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
	if err := makeGroups(n.group()); err != nil {
		return err
	}
	c := n.cluster
	// Its /run is its own: what it shall have of ours has to be put there.
	kubeconfig, err := os.ReadFile(c.Kubeconfig)
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.Path("/run/"+kubeconfigFile), kubeconfig, 0o600); err != nil {
		return err
	}
	n.process, err = n.Start("unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child", "sh", "-c", nodeScript,
		n.group(), "/run/"+kubeconfigFile, n.IP.String(), c.programs["kubelet"], c.programs["kube-proxy"], c.Options.ProxyMode, podNetwork, PodImage, n.String(), dnsAddress)
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.pidFile(), []byte(strconv.Itoa(n.process.PID())), 0o644); err != nil {
		return err
	}
	if err := n.eventually(ctx, 2*time.Minute, func() error { return n.ctr(ctx, nil, "version") }); err != nil {
		return err
	}
	for _, image := range c.images {
		if err := n.importImage(ctx, image); err != nil {
			return err
		}
	}
	return n.Run(ctx, "touch", "/run/images-are-here")
}

// pidFile has the number of the process whose mounts the node's programs see.
func (n *Node) pidFile() string { return n.cluster.file(n.String() + ".pid") }

// Enter is the command that runs another among the node's programs, for those who have
// found the cluster by Open too.
func (n *Node) Enter(command ...string) ([]string, error) {
	pid, err := os.ReadFile(n.pidFile())
	if err != nil {
		return nil, fmt.Errorf("node %s does not run: %w", n, err)
	}
	ns := "/proc/" + string(pid) + "/ns/"
	return append([]string{
		"nsenter", "--net=" + ns + "net", "--uts=" + ns + "uts", "--mount=" + ns + "mnt", "--pid=" + ns + "pid_for_children", "--",
	}, command...), nil
}

// ctr runs containerd's own client.
func (n *Node) ctr(ctx context.Context, stdin io.Reader, args ...string) error {
	cmd := n.Command(ctx, append([]string{"ctr", "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io"}, args...)...)
	cmd.Stdin = stdin
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: ctr %s: %w\n%s", n, strings.Join(args, " "), err, out)
	}
	return nil
}

// importImage gives the node an image that lies outside of it.
func (n *Node) importImage(ctx context.Context, path string) error {
	archive, err := os.Open(path)
	if err != nil {
		return err
	}
	defer archive.Close()
	return n.ctr(ctx, archive, "images", "import", "-")
}

// Reinstall makes the node anew, with the address that the node of another number
// would have: what a machine keeps that is set up again and got another address. The
// devices of its network are still there, as their remains may be.
func (n *Node) Reinstall(ctx context.Context, number int) error {
	if err := n.stop(); err != nil {
		return err
	}
	if err := n.Run(ctx, "sh", "-c", "rm -rf /run/containerd* /run/kubelet* /run/overlay /run/work /run/images-are-here /run/flannel"); err != nil {
		return err
	}
	if err := n.MoveUplink(ctx, number); err != nil {
		return err
	}
	return n.start(ctx)
}

// Processes are the numbers of the processes of a program that run in the node's
// containers.
func (n *Node) Processes(program string) ([]int, error) {
	groups, err := filepath.Glob("/proc/[0-9]*/cgroup")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, path := range groups {
		group, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(group), "/"+n.group()+"/") {
			continue // it has gone, or is none of ours
		}
		name, err := os.ReadFile(filepath.Join(filepath.Dir(path), "comm"))
		if err != nil || strings.TrimSpace(string(name)) != program {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

// EnterPod is the command that runs another in the network namespace of the node's pod
// with an address.
func (n *Node) EnterPod(ctx context.Context, ip string, command ...string) ([]string, error) {
	pids, err := n.Processes(filepath.Base(podPlace))
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		enter := []string{"nsenter", fmt.Sprintf("--net=/proc/%d/ns/net", pid), "--"}
		out, err := exec.CommandContext(ctx, enter[0], append(enter[1:], "ip", "-4", "-oneline", "address")...).Output()
		if err == nil && strings.Contains(string(out), " "+ip+"/") {
			return append(enter, command...), nil
		}
	}
	return nil, fmt.Errorf("node %s has no pod with address %s", n, ip)
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

// stop ends the node's programs and takes away the control groups that they leave.
func (n *Node) stop() error {
	if n.process == nil {
		return nil
	}
	return errors.Join(n.process.Stop(syscall.SIGKILL), removeGroups(n.group()))
}

// group is the node's control group in every hierarchy.
func (n *Node) group() string { return groupPrefix + n.Namespace() }

// groupPrefix is what the names of all clusters' groups begin with; the lab's name
// follows.
const groupPrefix = "weft-"

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
	found, errs := findGroups(group), []error{}
	for _, top := range found {
		var dirs []string
		err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				dirs = append(dirs, path)
			}
			return err
		})
		errs = append(errs, err)
		for _, dir := range slices.Backward(dirs) {
			if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// findGroups finds the control groups of a name, which may have wildcards, in all
// hierarchies.
func findGroups(name string) (found []string) {
	for _, pattern := range []string{groupRoot + "/" + name, groupRoot + "/*/" + name} {
		paths, _ := filepath.Glob(pattern) // the pattern is good
		found = append(found, paths...)
	}
	return found
}

// removeGroupsOf removes what is left of a cluster's control groups.
func removeGroupsOf(lab string) error {
	var errs []error
	for _, path := range findGroups(groupPrefix + lab + "-*") {
		errs = append(errs, removeGroups(filepath.Base(path)))
	}
	return errors.Join(errs...)
}

// removeAbandonedGroups removes those of clusters whose lab is gone: somebody killed
// the process that had made them.
func removeAbandonedGroups() error {
	labs, err := lab.Names()
	errs := []error{err}
	for _, path := range findGroups(groupPrefix + "*-n[0-9]*") {
		name, _, _ := strings.Cut(strings.TrimPrefix(filepath.Base(path), groupPrefix), "-")
		if !slices.Contains(labs, name) {
			errs = append(errs, removeGroups(filepath.Base(path)))
		}
	}
	return errors.Join(errs...)
}

// Log is the end of what the node's programs have printed.
func (n *Node) Log() string {
	lines := strings.Split(n.process.Output(), "\n")
	return strings.Join(lines[max(0, len(lines)-40):], "\n")
}
