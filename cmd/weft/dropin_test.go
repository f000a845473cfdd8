package main

import (
	"encoding/json"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"

	"github.com/weft-net/weft/dataplane"
)

// inFlannelsManifest is the environment that flannel's manifest gives its container.
var inFlannelsManifest = map[string]string{"POD_NAME": "kube-flannel-ds-x7k2p", "POD_NAMESPACE": "kube-flannel"}

func getenvOf(env map[string]string) func(string) string {
	return func(name string) string { return env[name] }
}

var withoutCapabilities = dataplane.Report{
	Mode: dataplane.ModeKernel, Reason: "programs can't be loaded without the capabilities BPF, PERFMON",
	MissingCapabilities: []string{"BPF", "PERFMON"},
}

// The patch is a part of a DaemonSet, with the names of flannel's manifest, by which
// an API server merges it, and with all capabilities, which it replaces.
func TestWayToPrograms(t *testing.T) {
	command := wayToPrograms(getenvOf(inFlannelsManifest), withoutCapabilities)
	head, rest, _ := strings.Cut(command, " '")
	patch, tail, _ := strings.Cut(rest, "'")
	if want := "kubectl -n kube-flannel patch daemonset kube-flannel-ds --patch"; head != want || tail != "" {
		t.Fatalf("%s\nwant %s '...'", command, want)
	}
	var d appsv1.DaemonSet
	decoder := json.NewDecoder(strings.NewReader(patch))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&d); err != nil {
		t.Fatal(err)
	}
	pod := d.Spec.Template.Spec
	if len(pod.Containers) != 1 || pod.Containers[0].Name != "kube-flannel" {
		t.Fatalf("containers: %+v", pod.Containers)
	}
	var got []string
	for _, c := range pod.Containers[0].SecurityContext.Capabilities.Add {
		got = append(got, string(c))
	}
	paths := map[string]string{}
	for _, v := range pod.Volumes {
		paths[v.Name] = v.HostPath.Path
	}
	for _, m := range pod.Containers[0].VolumeMounts {
		got = append(got, paths[m.Name]+" at "+m.MountPath)
	}
	want := "BPF NET_ADMIN NET_RAW PERFMON /sys/fs/bpf at /sys/fs/bpf /proc/sys/net at /host/proc/sys/net /var/lib/cni at /var/lib/cni"
	if strings.Join(got, " ") != want {
		t.Errorf("the pod gets %s\nwant %s", strings.Join(got, " "), want)
	}
}

func TestNoWayToProgramsIsTold(t *testing.T) {
	ebpf, complete := withoutCapabilities, withoutCapabilities
	ebpf.Mode, complete.MissingCapabilities = dataplane.ModeEBPF, nil
	for name, c := range map[string]struct {
		env    map[string]string
		report dataplane.Report
	}{
		"outside a pod":            {nil, withoutCapabilities},
		"in a pod without a set":   {map[string]string{"POD_NAME": "agent", "POD_NAMESPACE": "n"}, withoutCapabilities},
		"programs are there":       {inFlannelsManifest, ebpf},
		"it is not capabilities":   {inFlannelsManifest, complete},
		"the namespace is unknown": {map[string]string{"POD_NAME": "kube-flannel-ds-x7k2p"}, withoutCapabilities},
	} {
		if got := wayToPrograms(getenvOf(c.env), c.report); got != "" {
			t.Errorf("%s: %s", name, got)
		}
	}
}

// The agent says it once in its log, and every status says it.
func TestFlannelsManifestWithOnlyTheImageChanged(t *testing.T) {
	d := newDesk(t)
	d.env = inFlannelsManifest
	command := wayToPrograms(d.getenv, withoutCapabilities)
	var log syncBuffer
	o := agentOptions{LogLevel: "info"}
	a := &agent{log: o.logger(&env{stderr: &log}), path: fakeDatapath{d.node}, getenv: d.getenv, record: newRecord(d.runDir, runInfo{}, nil)}
	d.node.report = withoutCapabilities
	a.look(noon)
	a.look(noon.Add(24 * 60 * 60e9))
	if text := log.String(); strings.Count(text, "kubectl") != 1 || !strings.Contains(text, "eBPF is off") || !strings.Contains(strings.ReplaceAll(text, `\"`, `"`), command) {
		t.Errorf("the log is\n%s", text)
	}
	d.ran(func(r *runInfo) {
		*r = runInfo{SchemaVersion: runSchema, Mode: "kernel", WayToPrograms: a.record.Info().WayToPrograms}
	})
	if status := d.must("status"); !strings.Contains(status, command+"\n") {
		t.Errorf("the status is\n%s", status)
	}
	// Once there are programs nothing is to be done.
	d.node.report = dataplane.Report{Mode: dataplane.ModeEBPF}
	a.look(noon.Add(48 * 60 * 60e9))
	if got := a.record.Info().WayToPrograms; got != "" {
		t.Errorf("%s", got)
	}
}
