package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/weft-net/weft/controlplane/etcd"
	"github.com/weft-net/weft/controlplane/flannel"
	"github.com/weft-net/weft/dataplane/state"
)

// discard is for those who would log what a check says.
var discard = slog.New(slog.DiscardHandler)

// etcdPatience is how long a check waits for etcd.
const etcdPatience = 10 * time.Second

// runMigrate is "weft migrate".
func runMigrate(e *env, args []string) error {
	var o agentOptions
	flags := newFlags(e, "migrate", "check [flags of the agent]", `Looks at a node that flannel serves, and says what weft would find when it takes
flannel's place: whether the configuration and the files of flannel are understood,
whether the overlay devices can be taken over as they are, and whether packets could
be carried by eBPF. Nothing is changed, and flannel goes on running. Give it the
arguments that flanneld has. The exit status is 1 if something has to be done first.`)
	o.register(flags.FlagSet)
	verb, err := parseFlags(flags, args, "check")
	if err != nil {
		return err
	}
	if len(verb) == 0 || verb[0] != "check" {
		return usagef("migrate: say \"weft migrate check\", with the arguments that flanneld has")
	}
	if o.Config != "" {
		return usagef("migrate: a node with --config is none of flannel's; give the arguments that flanneld has")
	}
	if err := o.Validate(); err != nil {
		return err
	}
	f := findings{}
	f.look(e, &o)
	return f.print(e.stdout)
}

// findings are what was looked at, in order.
type findings []finding

// finding is one thing that was looked at.
type finding struct {
	verdict verdict
	what    string
	text    string
}

type verdict string

const (
	isFine   verdict = "ok"
	isSlower verdict = "note" // it would work, if not as well as it might
	isFaulty verdict = "FAULT"
)

func (f *findings) add(v verdict, what, text string) { *f = append(*f, finding{v, what, text}) }

// look looks at everything. What leans on something faulty is not looked at.
func (f *findings) look(e *env, o *agentOptions) {
	config, err := readConfig(e.ctx, o)
	if err != nil {
		f.add(isFaulty, "configuration", err.Error())
		return
	}
	f.add(isFine, "configuration", fmt.Sprintf("%s, VXLAN network %d at port %d", joined(config.Networks()), config.VNI, config.Port))

	s := config.State()
	data, err := os.ReadFile(o.SubnetFile)
	var subnet flannel.SubnetEnv
	if err == nil {
		subnet, err = flannel.ParseSubnetEnv(data)
	}
	if err != nil {
		f.add(isFaulty, "subnet", fmt.Sprintf("%v; flannel writes it when it runs", err))
		return
	}
	for _, p := range []netip.Prefix{subnet.Subnet, subnet.IPv6Subnet} {
		if p.IsValid() {
			s.Local.Prefixes = append(s.Local.Prefixes, p.Masked())
		}
	}
	f.add(isFine, "subnet", fmt.Sprintf("%s, as %s says", joined(s.Local.Prefixes), o.SubnetFile))
	if len(s.Local.Prefixes) != len(s.Networks) {
		f.add(isFaulty, "subnet", fmt.Sprintf("the configuration has the networks %s", joined(s.Networks)))
		return
	}

	if err := f.uplink(e, o, config, &s); err != nil {
		f.add(isFaulty, "uplink", err.Error())
		return
	}
	f.survey(e, s)
}

// readConfig reads the network's configuration where flanneld does.
func readConfig(ctx context.Context, o *agentOptions) (flannel.Config, error) {
	if o.KubeSubnetMgr {
		data, err := os.ReadFile(o.NetConfigPath)
		if err != nil {
			return flannel.Config{}, fmt.Errorf("%w; give --net-config-path and a copy of net-conf.json from the ConfigMap", err)
		}
		return flannel.ParseConfig(data)
	}
	store, err := etcd.Open(o.etcd(discard))
	if err != nil {
		return flannel.Config{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, etcdPatience)
	defer cancel()
	return store.Config(ctx)
}

// uplink finds the uplink, and puts it into the state.
func (f *findings) uplink(e *env, o *agentOptions, config flannel.Config, s *state.State) error {
	finder, err := e.node.OpenUplink(discard)
	if err != nil {
		return err
	}
	defer finder.Close()
	found, err := finder.Find(o.uplink(config.EnableIPv4, config.EnableIPv6))
	if err != nil {
		return err
	}
	l := &s.Local
	l.Uplink, l.Address, l.AddressV6 = found.Name, found.Address, found.AddressV6
	l.PublicIP, l.PublicIPv6 = found.PublicIP, found.PublicIPv6
	f.add(isFine, "uplink", fmt.Sprintf("%s, whose MTU is %d; peers reach this node at %s", found.Name, found.MTU, joined(validOf(found.PublicIP, found.PublicIPv6))))
	return nil
}

// survey looks at the kernel.
func (f *findings) survey(e *env, s state.State) {
	found, err := e.node.Survey(s)
	switch {
	case err != nil:
		f.add(isFaulty, "devices", err.Error())
		return
	case len(found.Missing) > 0:
		f.add(isFaulty, "devices", strings.Join(found.Missing, " and ")+" missing; flannel makes its devices when it runs")
	case found.Remade:
		f.add(isFaulty, "devices", "flannel has made them with another configuration, and weft would make them anew, which interrupts the traffic; restart flannel first. Weft would:\n"+strings.Join(found.Changes, "\n"))
	case len(found.Changes) > 0:
		f.add(isFine, "devices", "they are taken over, and changed in place:\n"+strings.Join(found.Changes, "\n"))
	default:
		f.add(isFine, "devices", "they are taken over as they are")
	}
	if len(found.NoPrograms) > 0 {
		f.add(isSlower, "eBPF", "the kernel would carry all packets, as with flannel: "+strings.Join(found.NoPrograms, "; "))
		return
	}
	f.add(isFine, "eBPF", "the kernel takes the programs")
	if len(found.NoExpress) > 0 {
		f.add(isSlower, "express", "packets would take the base path: "+strings.Join(found.NoExpress, "; "))
		return
	}
	f.add(isFine, "express", "nothing is in its way")
}

// print writes a line for each, and its further lines below.
func (f findings) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	var result error
	for _, k := range f {
		fmt.Fprintf(w, "%s\t%s\t%s\n", k.verdict, k.what, strings.ReplaceAll(k.text, "\n", "\n\t\t"))
		if k.verdict == isFaulty {
			result = errReported
		}
	}
	return cmp.Or(w.Flush(), result)
}

// joined lists things in words.
func joined[T fmt.Stringer](things []T) string {
	words := make([]string, len(things))
	for i, t := range things {
		words[i] = t.String()
	}
	return strings.Join(words, " and ")
}

// validOf are those addresses that are there.
func validOf(addresses ...netip.Addr) (there []netip.Addr) {
	for _, a := range addresses {
		if a.IsValid() {
			there = append(there, a)
		}
	}
	return there
}
