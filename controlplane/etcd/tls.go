package etcd

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
)

// tlsConfig reads the certificates, so that a wrong one is found before
// anything else is done. It is nil when connections are not encrypted.
func (o Options) tlsConfig() (*tls.Config, error) {
	if !o.secure() {
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	var faults []error
	if o.CAFile != "" {
		pool, err := readPool(o.CAFile)
		if err != nil {
			faults = append(faults, fmt.Errorf("--etcd-cafile: %w", err))
		}
		config.RootCAs = pool
	}
	if o.CertFile != "" {
		read := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(o.CertFile, o.KeyFile)
			if err != nil {
				return nil, fmt.Errorf("--etcd-certfile %s and --etcd-keyfile %s: %w", o.CertFile, o.KeyFile, err)
			}
			return &pair, nil
		}
		if _, err := read(); err != nil {
			faults = append(faults, err)
		}
		// Certificates are replaced before they expire, under a running agent.
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return read() }
	}
	return config, errors.Join(faults...)
}

// readPool reads a file of PEM certificates.
func readPool(path string) (*x509.CertPool, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("%s holds no PEM certificate", path)
	}
	return pool, nil
}
