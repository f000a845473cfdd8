//go:build linux

package verdicts

// polledSettings decide about forwarded packets, and send no event when they
// are changed: those of bridge-netfilter, and some for all devices. (Those of
// single devices are too many to be read again and again.)
var polledSettings = []string{
	"bridge/bridge-nf-call-arptables",
	"bridge/bridge-nf-call-ip6tables",
	"bridge/bridge-nf-call-iptables",
	"bridge/bridge-nf-filter-pppoe-tagged",
	"bridge/bridge-nf-filter-vlan-tagged",
	"bridge/bridge-nf-pass-vlan-input-dev",
	"ipv4/conf/all/accept_local",
	"ipv4/conf/all/disable_policy",
	"ipv4/conf/all/disable_xfrm",
	"ipv4/conf/all/route_localnet",
	"ipv4/conf/all/src_valid_mark",
	"ipv6/conf/all/disable_policy",
}

// settings are sysctls, as they were last.
type settings struct {
	files []procFile
	last  []string
}

func newSettings() settings {
	s := settings{last: make([]string, len(polledSettings))}
	for _, name := range polledSettings {
		s.files = append(s.files, newProcFile("/proc/sys/net/"+name))
	}
	return s
}

// open opens those in the calling thread's namespace that were not there before.
func (s *settings) open() {
	for i := range s.files {
		s.files[i].open()
	}
}

func (s *settings) close() {
	for i := range s.files {
		s.files[i].close()
	}
}

// changed reads the settings, and tells whether they are others than the last
// time.
func (s *settings) changed() bool {
	changed := false
	b := make([]byte, 32)
	for i := range s.files {
		value, _ := s.files[i].read(b) // one that can't be read is as one that is not there
		if s.last[i] != string(value) {
			s.last[i], changed = string(value), true
		}
	}
	return changed
}
