package endpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"

	"github.com/weft-net/weft/dataplane/state"
)

// Bounds on what is read of a directory that others write.
const (
	maxResults    = 4096
	maxResultSize = 256 << 10
)

// cniResult is what a CNI plugin says it has made: the host's end of a veth and
// the pod's.
type cniResult struct {
	veth    string
	vethMAC state.MAC
	mac     state.MAC
	addrs   []netip.Addr
}

// errUnclear says that a result does not tell one pod behind one veth.
var errUnclear = errors.New("the result does not name one interface of a pod with its addresses")

// parseResult reads a result as libcni keeps it
// (https://www.cni.dev/docs/spec/#add-success). Results before version 0.3.0
// name no interfaces and are unclear, as are those of plugins that make several
// interfaces in one pod. hosts are all interfaces outside of it, bridges too:
// one of them is the veth.
func parseResult(text []byte) (hosts []cniResult, err error) {
	var file struct {
		Result struct {
			Interfaces []struct {
				Name    string `json:"name"`
				MAC     string `json:"mac"`
				Sandbox string `json:"sandbox"`
			} `json:"interfaces"`
			IPs []struct {
				Address   string `json:"address"`
				Interface *int   `json:"interface"`
			} `json:"ips"`
		} `json:"result"`
	}
	if err := json.Unmarshal(text, &file); err != nil {
		return nil, fmt.Errorf("reading a CNI result: %w", err)
	}
	var inside cniResult
	index := -1
	for i, in := range file.Result.Interfaces {
		mac, err := state.ParseMAC(in.MAC)
		switch {
		case in.Sandbox != "" && (index >= 0 || err != nil):
			return nil, errUnclear
		case in.Sandbox != "":
			index, inside.mac = i, mac
		case err == nil:
			hosts = append(hosts, cniResult{veth: in.Name, vethMAC: mac})
		}
	}
	for _, ip := range file.Result.IPs {
		if ip.Interface == nil || *ip.Interface != index {
			continue
		}
		if p, err := netip.ParsePrefix(ip.Address); err == nil {
			inside.addrs = append(inside.addrs, p.Addr().Unmap())
		}
	}
	if index < 0 || len(hosts) == 0 || len(inside.addrs) == 0 {
		return nil, errUnclear
	}
	for i := range hosts {
		hosts[i].mac, hosts[i].addrs = inside.mac, inside.addrs
	}
	return hosts, nil
}

// readResults reads all clear results of a directory, by name of the host's
// interface.
func readResults(dir fs.FS) (map[string][]cniResult, error) {
	entries, err := fs.ReadDir(dir, ".")
	if err != nil {
		return nil, fmt.Errorf("reading CNI results: %w", err)
	}
	if len(entries) > maxResults {
		return nil, fmt.Errorf("reading CNI results: there are %d, more than %d", len(entries), maxResults)
	}
	results := map[string][]cniResult{}
	for _, e := range entries {
		if !e.Type().IsRegular() {
			continue
		}
		text, err := readBounded(dir, e.Name())
		if err != nil {
			continue // it may have gone with its pod
		}
		hosts, err := parseResult(text)
		if err != nil {
			continue
		}
		for _, h := range hosts {
			results[h.veth] = append(results[h.veth], h)
		}
	}
	return results, nil
}

func readBounded(dir fs.FS, name string) ([]byte, error) {
	file, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	text, err := io.ReadAll(io.LimitReader(file, maxResultSize+1))
	if err == nil && len(text) > maxResultSize {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxResultSize)
	}
	return text, err
}

// podOf is what results say of the pod behind a veth. The veth must be the one
// that the plugin made, by name and MAC, and no other result may speak of it.
func podOf(veth device, results map[string][]cniResult) (pod, bool) {
	have := results[veth.name]
	if len(have) != 1 || have[0].vethMAC != veth.mac {
		return pod{}, false
	}
	r := have[0]
	// The two ends were made with one MTU; carrier says that the other is up.
	end := device{index: veth.peer, mac: r.mac, mtu: veth.mtu, up: veth.carrier, carrier: veth.carrier}
	return pod{end: end, addrs: r.addrs, cni: true}, true
}
