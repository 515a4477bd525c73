Console.Error.WriteLine("cpmx: no command given");
return 2;
