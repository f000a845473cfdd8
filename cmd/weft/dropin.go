package main

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/weft-net/weft/dataplane"
)

// flannelContainer is the name of the agent's container in flannel's manifest.
const flannelContainer = "kube-flannel"

// wayToPrograms is the command that gives this pod what programs need, empty when
// that is not what keeps them away. In flannel's own manifest, with only the image's
// name changed, the agent has what the kernel path needs and no more.
//
// A pod knows what it is called, and a DaemonSet's pods are called after it, with a
// dash and five letters.
func wayToPrograms(getenv func(string) string, r dataplane.Report) string {
	namespace, pod := getenv("POD_NAMESPACE"), getenv("POD_NAME")
	end := strings.LastIndexByte(pod, '-')
	if r.Mode != dataplane.ModeKernel || len(r.MissingCapabilities) == 0 || namespace == "" || end <= 0 {
		return ""
	}
	patch, err := json.Marshal(patchFor(r.MissingCapabilities))
	if err != nil {
		panic(err) // it is strings
	}
	return fmt.Sprintf("kubectl -n %s patch daemonset %s --patch '%s'", namespace, pod[:end], patch)
}

// object is a part of a patch.
type object = map[string]any

// patchFor is the strategic merge patch: containers and volumes are merged by name,
// mounts by path, and capabilities are replaced, so those of flannel are in it too.
func patchFor(missing []string) object {
	capabilities := slices.Concat([]string{"NET_ADMIN", "NET_RAW"}, missing)
	slices.Sort(capabilities)
	var mounts, volumes []object
	for _, v := range []struct {
		name, host, path string
		readOnly         bool
	}{
		{"bpffs", "/sys/fs/bpf", "/sys/fs/bpf", false},
		{"sysctls", "/proc/sys/net", "/host/proc/sys/net", false},
		{"cni-results", "/var/lib/cni", "/var/lib/cni", true},
	} {
		mount := object{"name": v.name, "mountPath": v.path}
		if v.readOnly {
			mount["readOnly"] = true
		}
		mounts = append(mounts, mount)
		volumes = append(volumes, object{"name": v.name, "hostPath": object{"path": v.host}})
	}
	return object{"spec": object{"template": object{"spec": object{
		"containers": []object{{
			"name":            flannelContainer,
			"securityContext": object{"capabilities": object{"add": slices.Compact(capabilities)}},
			"volumeMounts":    mounts,
		}},
		"volumes": volumes,
	}}}}
}
