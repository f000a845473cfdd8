//go:build linux

package hostrules

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// kubeletChains are made in table mangle by a kubelet, in the flavour that it
// uses, so that others know.
var kubeletChains = []string{"KUBE-IPTABLES-HINT", "KUBE-KUBELET-CANARY"}

// nftTables are the tables that iptables-nft may have.
var nftTables = []string{"filter", "nat", "mangle", "raw", "security"}

// detect finds out which flavour the host uses, as the wrapper in flannel's image
// does:
//
//  1. that in which a kubelet has left its mark,
//  2. else that which has more rules, of both families,
//  3. else that of the iptables in PATH (which flannel takes where there is no
//     wrapper),
//  4. else nft.
//
// A flavour whose program is missing, or that the kernel does not have, is out of
// the question. The text says why it was chosen.
func (p programs) detect(ctx context.Context, s *socket) (_ flavour, why string, err error) {
	usable, err := p.usable(ctx, s)
	if err != nil {
		return "", "", err
	}
	marked, rules := map[flavour]bool{}, map[flavour]int{}
	if marked[nft], rules[nft], err = lookAtNft(s); err != nil {
		return "", "", err
	}
	if marked[legacy], rules[legacy], err = p.lookAtLegacy(ctx); err != nil {
		return "", "", err
	}
	if len(usable) == 1 {
		why := "no other can be used here"
		for _, f := range flavours {
			if f != usable[0] && (marked[f] || rules[f] > 0) {
				why = fmt.Sprintf("%s, although the host has %d rules of %s", why, rules[f], f)
			}
		}
		return usable[0], why, nil
	}
	for _, f := range flavours {
		if marked[f] {
			return f, "kubelet uses it", nil
		}
	}
	if rules[nft] != rules[legacy] {
		choice := nft
		if rules[legacy] > rules[nft] {
			choice = legacy
		}
		return choice, fmt.Sprintf("the host has %d rules of nft and %d of legacy", rules[nft], rules[legacy]), nil
	}
	if path, err := exec.LookPath(ipv4.program); err == nil {
		if is, err := p.flavourOf(ctx, path); err == nil {
			return is, path + " is of it", nil
		}
	}
	return nft, "nothing speaks for either", nil
}

// usable are the flavours that have a program and a kernel.
func (p programs) usable(ctx context.Context, s *socket) (usable []flavour, err error) {
	var errs []error
	for _, f := range flavours {
		if _, err := p.find(ctx, ipv4, "", f); errors.Is(err, ErrNoProgram) {
			continue
		} else if err != nil {
			errs = append(errs, err)
			continue
		}
		if f == nft {
			if _, err := s.generation(); err != nil {
				errs = append(errs, err)
				continue
			}
		}
		usable = append(usable, f)
	}
	if len(usable) > 0 {
		return usable, nil
	}
	if len(errs) == 0 {
		return nil, fmt.Errorf("there is no iptables, iptables-nft or iptables-legacy in PATH (%s): %w", os.Getenv("PATH"), ErrNoProgram)
	}
	return nil, errors.Join(errs...)
}

// lookAtNft looks for a kubelet's mark and counts rules. A kernel without
// nf_tables has none.
func lookAtNft(s *socket) (marked bool, rules int, err error) {
	for _, f := range families {
		for _, name := range kubeletChains {
			_, found, err := s.chain(f, "mangle", name)
			if err != nil && !errors.Is(err, ErrUnsupported) {
				return false, 0, err
			}
			marked = marked || found
		}
		for _, table := range nftTables {
			n, err := s.countRules(f, table)
			if err != nil && !errors.Is(err, ErrUnsupported) {
				return false, 0, err
			}
			rules += n
		}
	}
	return marked, rules, nil
}

// lookAtLegacy does the same for legacy. Tables that are not there are not looked
// at: that would make them.
func (p programs) lookAtLegacy(ctx context.Context) (marked bool, rules int, err error) {
	for _, f := range families {
		tables, err := legacyTables(f)
		if err != nil {
			return false, 0, err
		}
		for _, table := range tables {
			program, err := p.find(ctx, f, "", legacy)
			if errors.Is(err, ErrNoProgram) {
				continue
			}
			if err != nil {
				return false, 0, err
			}
			text, err := run(ctx, "", program, "-w", lockWait, "-t", table, "-S")
			if err != nil {
				return false, 0, fmt.Errorf("listing table %s: %w", table, err)
			}
			for line := range strings.Lines(text) {
				switch command, rest, _ := strings.Cut(strings.TrimSpace(line), " "); command {
				case "-A":
					rules++
				case "-N":
					marked = marked || table == "mangle" && slices.Contains(kubeletChains, rest)
				}
			}
		}
	}
	return marked, rules, nil
}

// legacyTables lists the tables that there are. Without iptables-legacy in the
// kernel there are none.
func legacyTables(f *family) ([]string, error) {
	b, err := os.ReadFile(f.legacyTables)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the tables of iptables-legacy: %w", err)
	}
	return strings.Fields(string(b)), nil
}
