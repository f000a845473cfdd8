//go:build linux

package dataplane

import (
	"errors"
	"log/slog"
	"slices"

	"github.com/weft-net/weft/dataplane/endpoint"
	"github.com/weft-net/weft/dataplane/firewall"
	"github.com/weft-net/weft/dataplane/kernel"
	"github.com/weft-net/weft/dataplane/state"
	"github.com/weft-net/weft/dataplane/verdicts"
)

// injection keeps pods from sending into the overlay network as if they were
// nodes: the firewall's part of it, which needs no programs.
type injection struct {
	log      *slog.Logger
	firewall *firewall.Firewall // nil where there can't be one
	reason   string             // why there is none, or not as it should be
	rules    firewall.Rules
	overlays []string
	pods     []string
}

// openInjection prepares the firewall. A kernel that can't have one is no error.
func openInjection(log *slog.Logger) *injection {
	i := &injection{log: log}
	var err error
	if i.firewall, err = firewall.Open(log); err != nil {
		i.fail(err)
	}
	return i
}

// unheardBy has no element of its sets told to who follows the host's rules: they
// are more than anything else that changes there.
func (i *injection) unheardBy(w *verdicts.Watcher) {
	if i.firewall != nil {
		i.firewall.Around(w.Unheard)
	}
}

// syncState takes over what a state says, with those of its aliases that can be.
func (i *injection) syncState(s state.State, aliases []state.Alias, overlays []kernel.Overlay) {
	i.rules.Port, i.rules.Prefixes = s.Port, s.Local.Prefixes
	i.rules.Nodes = i.rules.Nodes[:0]
	for _, p := range s.Peers {
		i.rules.Nodes = append(i.rules.Nodes, p.PublicIP)
		i.rules.Nodes = append(i.rules.Nodes, state.NodeAddresses(p.Prefix)...)
	}
	for _, a := range aliases {
		i.rules.Nodes = append(i.rules.Nodes, a.Addr)
	}
	i.overlays = nil
	for _, o := range overlays {
		i.overlays = append(i.overlays, o.Name)
	}
	i.sync()
}

// syncPods takes over behind which devices pods are.
func (i *injection) syncPods(found endpoint.Found) {
	var pods []string
	for _, e := range found.Endpoints {
		if e.Bridge != "" {
			pods = append(pods, e.Bridge)
		} else {
			pods = append(pods, e.Name)
		}
	}
	for _, l := range found.LeftAlone {
		pods = append(pods, l.Name)
	}
	slices.Sort(pods)
	pods = slices.Compact(pods)
	if slices.Equal(pods, i.pods) {
		return
	}
	i.pods = pods
	i.sync()
}

func (i *injection) sync() {
	if i.firewall == nil || i.rules.Port == 0 {
		return
	}
	i.rules.Devices = slices.Concat(i.overlays, i.pods)
	i.fail(i.firewall.Sync(i.rules))
}

// fail remembers what is wrong, and logs a change.
func (i *injection) fail(err error) {
	now := ""
	if err != nil {
		now = err.Error()
	}
	if now == i.reason {
		return
	}
	i.reason = now
	if now == "" {
		i.log.Info("the firewall keeps pods from the VXLAN port again")
		return
	}
	i.log.Warn("the firewall does not keep pods from the VXLAN port as it should; programs on pods' veths do, where there are any", "err", err)
}

func (i *injection) close() error {
	if i.firewall == nil {
		return nil
	}
	return i.firewall.Close()
}

// inspectFirewall reads what the firewall has dropped. Without a table nothing.
func inspectFirewall() (Firewall, error) {
	f, err := firewall.Open(slog.New(slog.DiscardHandler))
	if errors.Is(err, firewall.ErrUnsupported) {
		return Firewall{Reason: err.Error()}, nil
	}
	if err != nil {
		return Firewall{}, err
	}
	defer f.Close()
	var r Firewall
	r.DroppedPackets, r.DroppedBytes, err = f.Dropped()
	if errors.Is(err, firewall.ErrNoTable) {
		r.Reason, err = err.Error(), nil
	}
	return r, err
}

// removeFirewall takes the table away, and says so if it was there.
func removeFirewall() (removed []string, err error) {
	f, err := firewall.Open(slog.New(slog.DiscardHandler))
	if errors.Is(err, firewall.ErrUnsupported) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	there, err := f.Remove()
	if there {
		removed = []string{"nftables table inet weft"}
	}
	return removed, err
}
