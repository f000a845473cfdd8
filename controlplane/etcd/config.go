package etcd

import (
	"context"
	"fmt"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/weft-net/weft/controlplane"
	"github.com/weft-net/weft/controlplane/flannel"
)

// configure reads the network's configuration and waits for one that can be
// used. What was used first stays in force.
func (s *Store) configure(ctx context.Context, client *clientv3.Client, sink controlplane.Sink) error {
	for {
		text, found, err := s.readConfig(ctx, client)
		switch {
		case err != nil:
			return err
		case s.config != nil:
			s.compareConfig(text, found)
			return nil
		}
		config, err := s.parseConfig(text, found)
		if err == nil {
			s.config, s.configText = &config, text
			s.log.Info("read the network's configuration from etcd", "key", s.configKey, "networks", config.Networks(), "vni", config.VNI)
			return nil
		}
		sink.Health(err)
		if !sleep(ctx, jitter(s.timing.Config)) {
			return ctx.Err()
		}
	}
}

// Config asks etcd for the network's configuration. It is for who has to know
// before Run which families there are. An error may pass: etcd may be away, or
// nobody has written a configuration yet.
func (s *Store) Config(ctx context.Context) (flannel.Config, error) {
	client, err := s.connect(ctx)
	if err != nil {
		return flannel.Config{}, err
	}
	defer client.Close()
	text, found, err := s.readConfig(ctx, client)
	if err != nil {
		return flannel.Config{}, err
	}
	return s.parseConfig(text, found)
}

// parseConfig says what is to be done where there is none.
func (s *Store) parseConfig(text string, found bool) (flannel.Config, error) {
	if !found {
		return flannel.Config{}, fmt.Errorf("etcd has no configuration of the network; write it, as in: "+
			`etcdctl put %s '{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}'`, s.configKey)
	}
	config, err := flannel.ParseEtcdConfig([]byte(text))
	if err != nil {
		return flannel.Config{}, fmt.Errorf("the network's configuration in etcd, key %s: %w", s.configKey, err)
	}
	return config, nil
}

// readConfig asks for the configuration.
func (s *Store) readConfig(ctx context.Context, client *clientv3.Client) (text string, found bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.timing.Answer)
	defer cancel()
	answer, err := client.Get(ctx, s.configKey)
	if err != nil {
		return "", false, s.explain("reading the network's configuration, key "+s.configKey+", from etcd", err)
	}
	if len(answer.Kvs) == 0 {
		return "", false, nil
	}
	return string(answer.Kvs[0].Value), true, nil
}

// compareConfig says when the configuration is another than the one in force.
func (s *Store) compareConfig(text string, found bool) {
	if !found {
		text = ""
	}
	if text == s.configText {
		return
	}
	s.configText = text // said once
	s.log.Warn("the network's configuration in etcd has changed; restart the agent on every node to use it", "key", s.configKey)
}
