//go:build linux

package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// traces are what a cluster is known by on the machine, also when it is gone.
type traces struct {
	lab, directory string
	// namespaces are those that its processes are in, as links in /proc name them.
	namespaces map[string]bool
}

// namespaceKinds are those that every process of a cluster has one of its own of.
var namespaceKinds = []string{"net", "pid_for_children"}

// trace notes what to look for later.
func (c *Cluster) trace() (*traces, error) {
	t := &traces{lab: c.Lab.Name(), directory: c.Lab.Directory(), namespaces: map[string]bool{}}
	for _, n := range c.Nodes {
		for _, kind := range namespaceKinds {
			link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", n.process.PID(), kind))
			if err != nil {
				return nil, err
			}
			t.namespaces[link] = true
		}
	}
	return t, nil
}

// Traces are what there is of the cluster on the machine, by kind: names of network
// namespaces, control groups, mounts, files, processes. After Close there is nothing.
func (c *Cluster) Traces() (map[string][]string, error) {
	t := c.traces
	found := map[string][]string{"control groups": findGroups(groupPrefix + t.lab + "-*")}
	names, err := filepath.Glob("/run/netns/" + t.lab + "-*")
	if err != nil {
		return nil, err
	}
	found["namespaces"] = names
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "/"+t.lab+"-") || strings.Contains(line, t.directory) {
			found["mounts"] = append(found["mounts"], strings.TrimSpace(line))
		}
	}
	if _, err := os.Stat(t.directory); err == nil {
		found["files"] = append(found["files"], t.directory)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	for _, process := range processes {
		for _, kind := range []string{"net", "pid"} {
			link, err := os.Readlink(filepath.Join(process, "ns", kind))
			if err == nil && t.namespaces[link] { // else it has just ended
				found["processes"] = append(found["processes"], process)
				break
			}
		}
	}
	return found, nil
}
