package main

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/weft-net/weft/controlplane/flannel"
)

// dockerOptions are what can be chosen about dockerd's options.
type dockerOptions struct {
	FlannelEnv, DockerEnv string
	Key                   string
	Individual, Combined  bool
	NoIPMasq              bool
}

// runMkDockerOpts is "weft mk-docker-opts", which stands for flannel's
// mk-docker-opts.sh: the same options, and the same file.
func runMkDockerOpts(e *env, args []string) error {
	var o dockerOptions
	flags := newFlags(e, "mk-docker-opts", "[-f FILE] [-d FILE] [-i] [-c] [-m] [-k NAME]", `Makes options for dockerd of what the agent has written to subnet.env, and writes them to a
file for the EnvironmentFile= of dockerd's unit: each in a variable of its own, and all in one.
DOCKER_OPT_... in the environment are added. It is flannel's mk-docker-opts.sh, without a shell.`)
	flags.StringVar(&o.FlannelEnv, "f", "/run/flannel/subnet.env", "`file` to read; without it there are no options")
	flags.StringVar(&o.DockerEnv, "d", "/run/docker_opts.env", "`file` to write")
	flags.BoolVar(&o.Individual, "i", false, "write each option in a variable of its own, as in DOCKER_OPT_MTU; -i and -c are both meant when none is given")
	flags.BoolVar(&o.Combined, "c", false, "write all options in one variable")
	flags.StringVar(&o.Key, "k", "DOCKER_OPTS", "`name` of that variable; its value in the environment comes first")
	flags.BoolVar(&o.NoIPMasq, "m", false, "leave out --ip-masq")
	if _, err := parseFlags(flags, splitCluster(args)); err != nil {
		return err
	}
	if err := usageFaults("mk-docker-opts", o.faults()); err != nil {
		return err
	}
	return o.write(os.Environ())
}

// splitCluster takes apart what getopts allows and package flag does not: -ic
// and -kNAME.
func splitCluster(args []string) []string {
	var apart []string
	for i := 0; i < len(args); i++ {
		arg := args[i]
		switch {
		case arg == "--" || !strings.HasPrefix(arg, "-") || arg == "-":
			return append(apart, args[i:]...) // the end of the options
		case !strings.Contains("fdkicm", arg[1:2]):
			apart = append(apart, arg)
			continue
		}
		for letters := arg[1:]; letters != ""; letters = letters[1:] {
			apart = append(apart, "-"+letters[:1])
			if !strings.Contains("fdk", letters[:1]) {
				continue
			}
			if value := letters[1:]; value != "" {
				apart = append(apart, value)
			} else if i++; i < len(args) {
				apart = append(apart, args[i])
			}
			break
		}
	}
	return apart
}

// variableName is what a shell and systemd take as the name of a variable.
var variableName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// ownOption marks the variables that hold one option each.
const ownOption = "DOCKER_OPT_"

// faults lists what is wrong with the options.
func (o *dockerOptions) faults() []string {
	var faults []string
	if !variableName.MatchString(o.Key) || strings.Contains(o.Key, ownOption) {
		faults = append(faults, fmt.Sprintf("-k is %q; give the name of a variable, without %s in it", o.Key, ownOption))
	}
	for _, file := range []struct{ flag, value string }{{"-f", o.FlannelEnv}, {"-d", o.DockerEnv}} {
		if file.value == "" {
			faults = append(faults, fmt.Sprintf("%s is empty; give the path of a file", file.flag))
		}
	}
	return faults
}

// write makes the file. environ is the environment, in the form of os.Environ.
func (o *dockerOptions) write(environ []string) error {
	values, err := o.read(environ)
	if err != nil {
		return err
	}
	text, err := o.format(values)
	if err != nil {
		return err
	}
	// In place: the path may be a device, or a link that somebody follows.
	if err := os.WriteFile(o.DockerEnv, []byte(text), 0o666); err != nil {
		return fmt.Errorf("writing dockerd's options: %w", err)
	}
	return checkNotRouted(values["FLANNEL_SUBNET"])
}

// read returns the variables that there are: the environment's, and over them
// the file's. A file that is not there is as good as an empty one.
func (o *dockerOptions) read(environ []string) (map[string]string, error) {
	values := map[string]string{}
	for _, variable := range environ {
		if name, value, ok := strings.Cut(variable, "="); ok && variableName.MatchString(name) {
			values[name] = value
		}
	}
	if info, err := os.Stat(o.FlannelEnv); err != nil || !info.Mode().IsRegular() {
		return values, nil
	}
	data, err := os.ReadFile(o.FlannelEnv)
	if err != nil {
		return nil, fmt.Errorf("reading what the agent has written: %w", err)
	}
	written, err := flannel.ParseEnvFile(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", o.FlannelEnv, err)
	}
	maps.Copy(values, written)
	return values, nil
}

// format returns the file's content, in the script's order: variables by name,
// then the one that holds all.
func (o *dockerOptions) format(values map[string]string) (string, error) {
	if err := o.addOptions(values); err != nil {
		return "", err
	}
	individual, combined := o.Individual, o.Combined
	if !individual && !combined {
		individual, combined = true, true
	}
	all := values[o.Key]
	if all != "" {
		all += " "
	}
	var text strings.Builder
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if !strings.Contains(name, ownOption) {
			continue
		}
		value := strings.Join(strings.Fields(values[name]), " ")
		if err := quotable(name, value); err != nil {
			return "", err
		}
		if individual {
			fmt.Fprintf(&text, "%s=\"%s\"\n", name, value)
		}
		all += " " + value
	}
	if combined {
		if err := quotable(o.Key, all); err != nil {
			return "", err
		}
		fmt.Fprintf(&text, "%s=\"%s\"\n", o.Key, all)
	}
	return text.String(), nil
}

// addOptions adds the options that flannel's values make.
func (o *dockerOptions) addOptions(values map[string]string) error {
	if subnet := values["FLANNEL_SUBNET"]; subnet != "" {
		values["DOCKER_OPT_BIP"] = "--bip=" + subnet
	}
	if mtu := values["FLANNEL_MTU"]; mtu != "" {
		values["DOCKER_OPT_MTU"] = "--mtu=" + mtu
	}
	if o.NoIPMasq {
		return nil
	}
	// Who masquerades already does it for dockerd too.
	switch masq := values["FLANNEL_IPMASQ"]; masq {
	case "":
	case "true":
		values["DOCKER_OPT_IPMASQ"] = "--ip-masq=false"
	case "false":
		values["DOCKER_OPT_IPMASQ"] = "--ip-masq=true"
	default:
		return fmt.Errorf("FLANNEL_IPMASQ is %q in %s; it must be true or false", masq, o.FlannelEnv)
	}
	return nil
}

// quotable makes sure that a value means the same in double quotes, to systemd
// and to a shell.
func quotable(name, value string) error {
	unfit := func(r rune) bool { return r < ' ' || r == 0x7f || strings.ContainsRune("\"\\$`", r) }
	if strings.ContainsFunc(value, unfit) {
		return fmt.Errorf("%s is %q; quotes, backslashes, $ and control characters can't be in an option", name, value)
	}
	return nil
}

// checkNotRouted makes sure that the bridge's prefix does not lead to another
// node, as routes of a dead past do. subnet is the bridge's address with the
// prefix length; anything else is left to dockerd to complain about.
func checkNotRouted(subnet string) error {
	prefix, err := netip.ParsePrefix(subnet)
	if err != nil || !prefix.Addr().Is4() {
		return nil
	}
	prefix = prefix.Masked()
	routes, err := netlink.RouteList(nil, netlink.FAMILY_V4)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return fmt.Errorf("reading the routing table: %w", err)
	}
	for _, r := range routes {
		if r.Dst == nil || len(r.Gw) == 0 || r.Dst.String() != prefix.String() {
			continue
		}
		return fmt.Errorf("the routing table leads %s to %s already, so it can't be dockerd's; is it another node's? If not, remove the route (ip route del %s)", prefix, r.Gw, prefix)
	}
	return nil
}
