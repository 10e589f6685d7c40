export PATH=/opt/amenable/bin:$PATH
